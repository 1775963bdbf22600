"""Round the input of a linear to codes and back, with scales found at run time or before."""

import operator
from typing import Any

import torch
from torch.fx import Node

from fxopt.errors import CalibrationError
from fxopt.ir.program import dtype_of, shape_of
from fxopt.passes.base import Context
from fxopt.passes.quantization.options import ActivationOptions
from fxopt.rewrite.builder import Builder

ops = torch.ops.fxopt


def quantize_activation(
    build: Builder, node: Node, options: ActivationOptions, context: Context
) -> Node:
    """Round a linear's input per token or per tensor; the node that gives its values."""
    source: Any = node.args[0]
    symmetric = options.symmetric
    low, high = options.format.range(symmetric)
    rank = len(shape_of(source))
    if options.granularity == "token":
        block = [1] * (rank - 1) + [-1]
        qparams = build.call(ops.choose_qparams.default, source, block, symmetric, low, high)
        scale = build.call(operator.getitem, qparams, 0)
        zero_point = None if symmetric else build.call(operator.getitem, qparams, 1)
    else:
        block = [-1] * rank
        scale, zero_point = _static_qparams(build, source, context, options)
    storage = options.format.storage
    codes = build.call(ops.quantize.default, source, scale, zero_point, block, storage, low, high)
    return build.call(ops.dequantize.default, codes, scale, zero_point, block, dtype_of(source))


def _static_qparams(
    build: Builder, source: Node, context: Context, options: ActivationOptions
) -> tuple[Node, Node | None]:
    try:
        minimum = context.statistics["minimum"][source.name].min()
        maximum = context.statistics["maximum"][source.name].max()
    except KeyError as error:
        raise CalibrationError(
            f"no calibration range for {source.name!r}: it was not reached by the calibration "
            "data. Pass calibration data that uses this part of the model."
        ) from error
    rank = len(shape_of(source))
    edges = torch.stack([minimum, maximum]).reshape([2] + [1] * (rank - 1))
    low, high = options.format.range(options.symmetric)
    scale, zero_point = ops.choose_qparams(edges, [-1] * rank, options.symmetric, low, high)
    name = f"{source.name}_activation"
    scale_node = build.weight(f"{name}_scale", scale)
    if options.symmetric:
        return scale_node, None
    return scale_node, build.weight(f"{name}_zero_point", zero_point)
