"""Take the mean error that rounded weights make out of the bias of a linear.

    b' = b + W E[x] - Q E[y]    so that    E[Q y + b'] = E[W x + b]

Shapes: W and Q [out, in]; E[x] and E[y] [in] over the real tokens of the calibration data, x as
    the exact linear reads it and y as the rounded one does; b and b' [out].
Exactness: approximate; the mean error of each output is zero on inputs with this mean, up to the
    rounding of b'. What rounding the inputs adds on top is not seen.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
    2019, arXiv:1906.04721, section 4.2 (there the mean is derived from batch norm).
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.ir.stored_codes import stored_values
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
# Rows of a weight that are compared at a time, in float64.
_ROWS = 256


def mean_error(exact: Tensor, rounded: Tensor, mean: Tensor) -> Tensor:
    """(Q - W) E[x] in float64, [out]."""
    pairs = zip(rounded.split(_ROWS), exact.split(_ROWS), strict=True)
    return torch.cat([(q.double() - w.double()) @ mean.double() for q, w in pairs])


def correct_bias(
    program: Program,
    build: Builder,
    linear: Node,
    exact: Node,
    mean: Tensor,
    original_mean: Tensor | None = None,
) -> bool:
    """Correct a linear that reads a stored weight instead of `exact`; whether its bias changed.

    `mean` is that of the linear's input, `original_mean` that of what the exact linear reads, where
    it is another. A linear without a bias gets one where the correction is not zero; a bias that
    others share or that is computed in the graph stays what it is for them.
    """
    weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    assert isinstance(weight, Node)  # noqa: S101 - it was stored just now
    name = str(exact.target)
    values = program.weight(name)
    correction = -mean_error(values, stored_values(program, weight), mean)
    if original_mean is not None:
        correction += values.double() @ (original_mean - mean).double()
    own = f"{name.rpartition('.')[0]}.corrected_bias".lstrip(".")
    if isinstance(bias, Node) and bias.op == "get_attr":
        before = program.weight(str(bias.target))
        after = (before.double() + correction).to(before.dtype)
        if torch.equal(before, after):
            return False
        corrected = build.new_weight(own, after)
    else:
        after = correction.to(values.dtype)
        if not bool(after.any()):
            return False
        corrected = build.new_weight(own, after)
        if isinstance(bias, Node):
            corrected = build.call(aten.add.Tensor, bias, corrected)
    args: list[Any] = [*linear.args[:2], corrected]
    linear.args = tuple(args)
    return True
