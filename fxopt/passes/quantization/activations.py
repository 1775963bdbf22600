"""Round the input of a linear to codes and back, with scales found at run time or before."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.observers import (
    Round,
    kl_range,
    moving_average_range,
    mse_range,
    percentile_range,
)
from fxopt.errors import CalibrationError
from fxopt.ir.program import dtype_of, shape_of
from fxopt.passes.base import Context
from fxopt.passes.quantization.options import ActivationOptions
from fxopt.rewrite.builder import Builder

ops = torch.ops.fxopt


def quantize_activation(
    build: Builder, node: Node, options: ActivationOptions, context: Context
) -> Node:
    """Round a linear's input by its granularity; the node that gives its values."""
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
        if options.granularity == "embedding_group" and options.groups > 1:
            block[-1] = width_of(node) // options.groups
        scale, zero_point = _static_qparams(build, source, context, options)
    storage = options.format.storage
    codes = build.call(ops.quantize.default, source, scale, zero_point, block, storage, low, high)
    return build.call(ops.dequantize.default, codes, scale, zero_point, block, dtype_of(source))


def round_by_token(x: Tensor, options: ActivationOptions) -> Tensor:
    """What the graph of `quantize_activation` computes at granularity "token"."""
    low, high = options.format.range(options.symmetric)
    block = [1] * (x.dim() - 1) + [-1]
    scale, zero = ops.choose_qparams(x, block, options.symmetric, low, high)
    zero_point = None if options.symmetric else zero
    codes = ops.quantize(x, scale, zero_point, block, options.format.storage, low, high)
    return ops.dequantize(codes, scale, zero_point, block, x.dtype)


def reads_rounded(node: Node) -> bool:
    """Whether the input of a linear is rounded already."""
    source = node.args[0]
    return isinstance(source, Node) and source.target is ops.dequantize.default


def width_of(node: Node) -> int:
    """How many inputs a linear has."""
    weight: Any = node.args[1]
    return int(shape_of(weight)[1])


def _static_qparams(
    build: Builder, source: Node, context: Context, options: ActivationOptions
) -> tuple[Node, Node | None]:
    if source.name not in context.statistics["minimum"]:
        raise CalibrationError(
            f"no calibration range for {source.name!r}: it was not reached by the calibration "
            "data. Pass calibration data that uses this part of the model."
        )
    edges = static_edges(source.name, context, options)  # [2, groups]
    if not bool(edges.any()):
        raise CalibrationError(
            f"{source.name!r} was zero for all of the calibration data (an expert that no token "
            "was sent to, perhaps), so no range can be told. Pass calibration data that uses this "
            "part of the model, or exclude it."
        )
    low, high = options.format.range(options.symmetric)
    scale, zero_point = ops.choose_qparams(edges, [-1, 1], options.symmetric, low, high)
    shape = [1] * (len(shape_of(source)) - 1) + [-1]
    name = f"{source.name}_activation"
    # Linears that read the same may be rounded by passes with other options.
    scale_node = build.equal_weight(f"{name}_scale", scale.reshape(shape))
    if options.symmetric:
        return scale_node, None
    return scale_node, build.equal_weight(f"{name}_zero_point", zero_point.reshape(shape))


def static_edges(name: str, context: Context, options: ActivationOptions) -> Tensor:
    """The ends of the ranges of an activation, [2, groups] or [2, 1], float32."""
    statistics = context.statistics
    low, high = statistics["minimum"][name], statistics["maximum"][name]
    if options.granularity == "embedding_group":
        groups = (options.groups, -1)
        return torch.stack([low.reshape(groups).amin(1), high.reshape(groups).amax(1)])
    if options.observer == "minmax":
        return torch.stack([low.min(), high.max()])[:, None]
    if options.observer == "moving_average":
        found = moving_average_range(statistics["batches"][name])
    elif options.observer == "percentile":
        found = percentile_range(statistics["histogram"][name], options.percentile)
    elif options.observer == "mse":
        histogram = statistics["histogram"][name]
        found = mse_range(histogram, _rounding(options), options.symmetric)
    else:
        found = kl_range(statistics["histogram"][name], options.format.high + 1)
    return torch.tensor(found, dtype=torch.float32)[:, None]


def _rounding(options: ActivationOptions) -> Round:
    """Values to the codes of a range and back."""
    low, high = options.format.range(options.symmetric)

    def rounded(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        edges = torch.stack([first, last])
        scale, zero_point = ops.choose_qparams(edges, [-1], options.symmetric, low, high)
        codes = ops.quantize(x, scale, zero_point, [-1], options.format.storage, low, high)
        return ops.dequantize(codes, scale, zero_point, [-1], x.dtype)

    return rounded
