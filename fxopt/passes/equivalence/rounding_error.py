"""How much linears err when a scale is applied to their input and both are rounded.

    error(s) = sum over linears of || Q(x / s) Q(W diag(s))^T - x W^T ||^2
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

quantization = torch.ops.fxopt
_LOW, _HIGH = {True: -127, False: -128}, 127


@dataclass(frozen=True)
class Rounding:
    """An activation's rows, the weights that read it, and how the activation will be rounded."""

    rows: Tensor  # [n, d]
    weights: Sequence[Tensor]  # [out, d] each
    low: Tensor  # [d], over all calibration data
    high: Tensor
    granularity: str  # "token" or "tensor"
    symmetric: bool


def rounding_error(rounding: Rounding, scale: Tensor | None) -> float:
    """The squared error for one scale [d]; None stands for no scale."""
    rows = rounding.rows
    factor = torch.ones_like(rounding.low) if scale is None else scale
    smooth = rows / factor.to(rows.dtype)
    rounded = _round_activation(smooth, rounding, factor)
    total = 0.0
    for weight in rounding.weights:
        wide = weight.to(rows.dtype)
        scaled = _round(wide * factor.to(rows.dtype), wide * factor.to(rows.dtype), [1, -1], True)
        total += float((rounded @ scaled.T - rows @ wide.T).double().square().sum())
    return total


def _round_activation(rows: Tensor, rounding: Rounding, factor: Tensor) -> Tensor:
    if rounding.granularity == "token":
        return _round(rows, rows, [1, -1], rounding.symmetric)
    edges = torch.stack([rounding.low / factor, rounding.high / factor]).to(rows.dtype)
    return _round(rows, edges, [-1, -1], rounding.symmetric)


def _round(value: Tensor, seen: Tensor, block: list[int], symmetric: bool) -> Tensor:
    low = _LOW[symmetric]
    scale, zero = quantization.choose_qparams(seen, block, symmetric, low, _HIGH)
    point = None if symmetric else zero
    integers = quantization.quantize(value, scale, point, block, torch.int8, low, _HIGH)
    return quantization.dequantize(integers, scale, point, block, value.dtype)
