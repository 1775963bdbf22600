"""Round a weight column by column, each column's error made up for by the columns after it.

    H = X^T X + damping mean(diag H) I,    U = upper Cholesky factor of H^-1
    q_i = round(w_i),   e_i = (w_i - q_i) / U_ii,   w_j -= e_i U_ij  for j > i

Shapes: W [out, in], X [tokens, in], H and U [in, in].
Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, ICLR 2023, arXiv:2210.17323. Deviations: a column that calibration never reached
    is rounded to nearest, not set to zero; groups lie within a block of lazy updates, so that
    their ranges are those of the weights as they are by then; a row keeps what rounding to nearest
    gives where that errs less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.passes.quantization.grid import Grid, choose_grid, output_loss
from fxopt.passes.quantization.options import WeightOptions

_DAMPING_TRIALS = 4


@dataclass(frozen=True)
class Hessian:
    """Second moments of a linear's input, and the factor of their inverse, in a column order."""

    moments: Tensor  # [in, in], float64, damped
    order: Tensor  # the columns in the order in which they are rounded
    factor: Tensor  # U in that order, float32
    damping: float  # what was needed to factorize


def hessian(rows: Sequence[Tensor], damping: float, act_order: bool) -> Hessian:
    """The Hessian of the squared output error of a linear on rows [n, in].

    Raises:
        CalibrationError: there are no rows, their squares overflow, or no damping makes it positive
            definite.
    """
    if not sum(len(part) for part in rows):
        raise CalibrationError("it was never reached by the calibration data.")
    return factorized(second_moments(rows), damping, act_order)


def second_moments(rows: Sequence[Tensor]) -> Tensor:
    """X^T X of rows [n, in] in batches, float64 [in, in].

    Raises:
        CalibrationError: squares overflow.
    """
    moments = torch.zeros(rows[0].shape[1], rows[0].shape[1], dtype=torch.float64)
    for part in rows:
        wide = part.float()
        moments += (wide.T @ wide).double()
    if not bool(torch.isfinite(moments).all()):
        largest = max(float(part.abs().max()) for part in rows if len(part))
        raise CalibrationError(
            f"its input reaches {largest:.3g}, whose square is more than float32 holds. Check the "
            "data and the model's dtype."
        )
    return moments


def factorized(moments: Tensor, damping: float, act_order: bool) -> Hessian:
    """The Hessian of moments [in, in], which get a diagonal where columns were never reached.

    Raises:
        CalibrationError: no damping makes it positive definite.
    """
    energy = moments.diagonal()
    moments.diagonal()[energy == 0] = float(energy.mean()) or 1.0
    order = energy.argsort(descending=True, stable=True) if act_order else torch.arange(len(energy))
    used = damping
    for trial in range(_DAMPING_TRIALS):
        used = damping * 10**trial
        damped = moments + used * energy.mean() * torch.eye(len(energy), dtype=torch.float64)
        factor = _inverse_factor(damped[order][:, order])
        if factor is not None:
            return Hessian(damped, order, factor, used)
    raise CalibrationError(
        f"its {len(energy)} inputs have a Hessian that is not positive definite, even with damping "
        f"{used:g}. Pass more, and more varied, calibration data."
    )


def _inverse_factor(moments: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if bool(failed) or not bool(torch.isfinite(upper).all()) else upper.float()


@dataclass(frozen=True)
class Compensated:
    """A rounded weight: values [out, in] on a grid, and how much it errs."""

    values: Tensor
    grid: Grid
    share: float  # its output error over that of rounding to nearest


def compensated(
    weight: Tensor, options: WeightOptions, h: Hessian, block_size: int, static_groups: bool
) -> Compensated:
    """Round a weight [out, in]; no row errs more than rounded to nearest."""
    wide = weight.float()
    span = options.block[1] if options.block[1] > 0 else wide.shape[1]
    whole = choose_grid(wide, options, output_loss(h.moments, options.block))
    static = static_groups or span == wide.shape[1]
    values, grid = _Columns(wide, options, h, whole if static else None, span).run(block_size)
    nearest = whole.round(wide)
    mine, plain = (output_error(wide - rounded, h) for rounded in (values, nearest))
    if options.block[0] == 1:
        worse = mine > plain
        values[worse], mine[worse] = nearest[worse], plain[worse]
        grid = _with_rows(grid, whole, worse)
    elif float(mine.sum()) > float(plain.sum()):
        values, grid, mine = nearest, whole, plain
    total = float(plain.sum())
    return Compensated(values, grid, float(mine.sum()) / total if total else 1.0)


def _with_rows(grid: Grid, other: Grid, rows: Tensor) -> Grid:
    """A grid with some rows of another one."""
    scale = torch.where(rows[:, None], other.scale, grid.scale)
    zero = grid.zero_point
    if zero is not None and other.zero_point is not None:
        zero = torch.where(rows[:, None], other.zero_point, zero)
    return Grid(grid.format, grid.block, scale, zero, grid.low, grid.high)


def output_error(difference: Tensor, h: Hessian) -> Tensor:
    """The squared error of each output over the calibration data, [out]."""
    return ((difference @ h.moments.float()) * difference).sum(1)


class _Columns:
    """One weight while its columns are rounded; columns lie in rows, in the order of `h`."""

    def __init__(
        self, weight: Tensor, options: WeightOptions, h: Hessian, static: Grid | None, span: int
    ) -> None:
        self.options = options
        self.order = h.order
        self.factor = h.factor
        self.moments = h.moments
        self.span = span
        self.columns = weight.T[h.order].contiguous()
        self.rounded = torch.empty_like(self.columns)
        self.grids: list[Grid] = [] if static is None else _per_span(static)
        self.static = static

    def run(self, block_size: int) -> tuple[Tensor, Grid]:
        width = self.span * max(1, block_size // self.span) if self.static is None else block_size
        for first in range(0, len(self.columns), width):
            last = min(first + width, len(self.columns))
            errors = self._round_block(first, last)
            rest = self.factor[first:last, last:]
            self.columns[last:].addmm_(rest.T, errors, alpha=-1)
        values = torch.empty_like(self.rounded)
        values[self.order] = self.rounded
        return values.T.contiguous(), self.static or _joined(self.grids, self.options)

    def _round_block(self, first: int, last: int) -> Tensor:
        block = self.columns[first:last]
        factor = self.factor[first:last, first:last]
        diagonal = factor.diagonal().tolist()
        errors = torch.empty_like(block)
        for i in range(last - first):
            if self.static is None and i % self.span == 0:
                group = block[i : i + self.span].T.contiguous()
                part = self.order[first + i : first + i + self.span]
                loss = output_loss(self.moments[part][:, part], self.options.block)
                self.grids += _per_span(choose_grid(group, self.options, loss))
            grid = self.grids[int(self.order[first + i]) // self.span]
            column = block[i]
            rounded = self.rounded[first + i] = _round_column(grid, column)
            torch.div(column - rounded, diagonal[i], out=errors[i])
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        return errors


def _round_column(grid: Grid, column: Tensor) -> Tensor:
    """`grid.round` of one column [out]; integers without the way through operators."""
    if grid.format.kind != "integer":
        return grid.round(column[:, None])[:, 0]
    scale = _per_row(grid.scale, len(column))
    if grid.zero_point is None:
        return column.div(scale).round_().clamp_(grid.low, grid.high).mul_(scale)
    zero = _per_row(grid.zero_point, len(column)).float()
    return column.div(scale).round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero).mul_(scale)


def _per_row(parameter: Tensor, rows: int) -> Tensor:
    """A parameter [blocks of rows, 1] as one value for each row."""
    flat = parameter[:, 0]
    return flat if len(flat) == rows else flat.repeat_interleave(rows // len(flat))


def _per_span(grid: Grid) -> list[Grid]:
    """A grid [.., spans of columns] as one grid for each span."""
    block = [grid.block[0], -1]
    zeros = [None] * grid.scale.shape[1] if grid.zero_point is None else grid.zero_point.split(1, 1)
    scales = [scale.contiguous() for scale in grid.scale.split(1, 1)]
    return [
        Grid(grid.format, block, scale, zero, grid.low, grid.high)
        for scale, zero in zip(scales, zeros, strict=True)
    ]


def _joined(grids: Sequence[Grid], options: WeightOptions) -> Grid:
    scale = torch.cat([grid.scale for grid in grids], 1)
    zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
    zero = torch.cat(zeros, 1) if zeros else None
    return Grid(grids[0].format, options.block, scale, zero, grids[0].low, grids[0].high)
