"""How much linears err when a scale is applied to their input and both are rounded.

    error(s) = sum over linears and tokens of weight_t || Q(x_t / s) Q(W diag(s))^T - x_t W^T ||^2
    weight_t = 1 / (||y_t||^2 + mean ||y||^2)

A linear's output is measured by the norm or softmax that reads it, so a token counts by its
relative error; tokens far below the mean, whose residual is the larger part, count less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

quantization = torch.ops.fxopt
_LOW, _HIGH = {True: -127, False: -128}, 127


def token_weights(energies: Tensor, usual: Tensor) -> Tensor:
    """How much the errors of tokens count, [n], by the energy of what they give and a usual one."""
    return 1 / (energies + usual).clamp(torch.finfo(energies.dtype).tiny)


@dataclass(frozen=True)
class Rounding:
    """An activation's rows, the weights that read it, and how the activation will be rounded."""

    rows: Tensor  # [n, d]
    weights: Sequence[Tensor]  # [out, d] each
    low: Tensor  # [d], over all calibration data
    high: Tensor
    granularity: str  # "token" or "tensor"
    symmetric: bool
    tokens: int  # that gave low and high

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What the linears give without rounding, [n, out] each."""
        return [self.rows @ weight.T for weight in self.weights]

    @cached_property
    def token_weights(self) -> list[Tensor]:
        """How much the error of a token counts, [n] for each linear."""
        energies = [output.square().sum(1) for output in self.outputs]
        return [token_weights(e, e.mean()) for e in energies]

    @cached_property
    def row_energies(self) -> list[Tensor]:
        """The squares of the rows, weighted by token, [d] for each linear."""
        return [counts @ self.rows.square() for counts in self.token_weights]

    @cached_property
    def column_energies(self) -> list[Tensor]:
        """The squares of the weights, summed over outputs, [d] each."""
        return [weight.square().sum(0) for weight in self.weights]

    @cached_property
    def magnitudes(self) -> list[Tensor]:
        """|W|, [out, d] each."""
        return [weight.abs() for weight in self.weights]

    @cached_property
    def ends(self) -> list[Tensor]:
        """What a range must reach over: |x| if it is symmetric, else x and -x; [n, d] or [1, d]."""
        rows = self.granularity == "token"
        low, high = (self.rows, self.rows) if rows else (self.low[None], self.high[None])
        return [torch.maximum(-low, high)] if self.symmetric else [high, -low]

    @property
    def steps(self) -> int:
        """Steps between the two ends of a rounded range."""
        return _HIGH - _LOW[self.symmetric]


def rounding_error(rounding: Rounding, scale: Tensor | None) -> float:
    """The error for one scale [d], by rounding; None stands for no scale."""
    rows = rounding.rows
    factor = torch.ones_like(rounding.low) if scale is None else scale
    rounded = _round_activation(rows / factor.to(rows.dtype), rounding, factor)
    total = 0.0
    for weight, exact, counts in zip(
        rounding.weights, rounding.outputs, rounding.token_weights, strict=True
    ):
        wide = weight * factor.to(rows.dtype)
        output = rounded @ _round(wide, wide, [1, -1], True).T
        total += float((output - exact).square().sum(1).double() @ counts.double())
    return total


def expected_error(rounding: Rounding, scale: Tensor) -> Tensor:
    """The error for one scale [d] if roundings were independent and uniform; differentiable."""
    total = torch.zeros((), dtype=scale.dtype)
    activation_step = _activation_step(rounding, 1 / scale)
    for magnitude, columns, rows, counts in zip(
        rounding.magnitudes,
        rounding.column_energies,
        rounding.row_energies,
        rounding.token_weights,
        strict=True,
    ):
        weight_step = largest(magnitude, scale) / _HIGH
        of_activation = (counts * activation_step.square()).sum() * (columns @ scale.square())
        of_weight = (rows @ scale.pow(-2)) * weight_step.square().sum()
        total = total + of_activation + of_weight
    return total / 12


def _activation_step(rounding: Rounding, inverse: Tensor) -> Tensor:
    """The distance of two rounded values, for each token or (of size one) for all of them."""
    reaches = [largest(end, inverse).clamp_min(0) for end in rounding.ends]
    span = 2 * reaches[0] if rounding.symmetric else reaches[0] + reaches[1]
    return span / rounding.steps


def largest(values: Tensor, scale: Tensor) -> Tensor:
    """The largest of values [n, d] times scale [d] in each row; gradients reach that one alone."""
    with torch.no_grad():
        places = (values * scale).argmax(1)
    return values.gather(1, places[:, None])[:, 0] * scale[places]


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
