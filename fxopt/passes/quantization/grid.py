"""The numbers that the blocks of a tensor are rounded to.

    integer   codes = clamp(round(x / s) + z, q_min, q_max),   x ~ s (codes - z)
    floating  codes = cast(clamp(x / s)),                      x ~ s codes
    codebook  codes = argmin_k |x / s - table_k|,              x ~ s table[codes]

Shapes: x [out, in]; s and z [out / block, in / block], float32 and integers.
Source: Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323 (the shrunk ranges of `range: mse`); Lin
    et al., AWQ, MLSys 2024, arXiv:2306.00978 (those of `range: output`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.number_formats import NumberFormat
from fxopt.ir.operators import block_counts
from fxopt.passes.quantization.options import WeightOptions

ops = torch.ops.fxopt
# Shares of the largest magnitude that `range: mse` tries: 1, 0.98, ... 0.4.
_SHRINK = [1 - step / 50 for step in range(31)]
# Grids make several temporaries as large as what they are given; some rows at a time keep them
# small.
_SLAB_ELEMENTS = 1 << 16

# What rounding a tensor [rows, in] to the second one costs, for each block.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every block, and the numbers between which values are rounded."""

    format: NumberFormat
    block: Sequence[int]
    scale: Tensor
    zero_point: Tensor | None
    low: int
    high: int

    def encode(self, x: Tensor) -> Tensor:
        """The codes nearest to a tensor's values."""
        if self.format.kind != "codebook":
            storage = self.format.storage
            return ops.quantize(
                x, self.scale, self.zero_point, self.block, storage, self.low, self.high
            )
        table = self.format.codebook().to(x.device)
        near = ops.quantize(x, self.scale, None, self.block, torch.float32, -1, 1)
        middles = ((table[1:] + table[:-1]) / 2).to(near.dtype)
        return torch.bucketize(near, middles).to(self.format.storage)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for."""
        if self.format.kind == "codebook":
            codes = self.format.codebook().to(codes.device)[codes.int()]
        return ops.dequantize(codes, self.scale, self.zero_point, self.block, dtype)

    def round(self, x: Tensor) -> Tensor:
        """The values on the grid nearest to a tensor's."""
        return self.decode(self.encode(x), x.dtype)


def choose_grid(x: Tensor, options: WeightOptions, loss: Loss | None = None) -> Grid:
    """The grid for a weight; with `range: mse` that of the least squared error per block.

    With `range: output` a `loss` takes the place of the squared error.
    """
    low, high = options.format.range(options.symmetric)
    block = options.block
    if block[0] == -1 or x.shape[0] == 0:
        return _grid_of(x, options, low, high, loss)
    rows = max(block[0], _SLAB_ELEMENTS // max(1, x.shape[1]) // block[0] * block[0])
    parts = [_grid_of(slab, options, low, high, loss) for slab in x.split(rows)]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Grid(
        options.format,
        block,
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        low,
        high,
    )


def _squared_error(block: Sequence[int]) -> Loss:
    def loss(x: Tensor, rounded: Tensor) -> Tensor:
        return sum_blocks((x - rounded).square(), block)

    return loss


def output_loss(moments: Tensor, block: Sequence[int]) -> Loss:
    """What rounding costs in a linear's output, from the second moments [in, in] of its input.

    Each block is judged as if the others were exact: d M d^T over its own inputs.
    """
    inputs = moments.shape[0]
    span = inputs if block[1] == -1 else block[1]
    spans = inputs // span
    every = torch.arange(spans)
    parts = moments.float().reshape(spans, span, spans, span)[every, :, every]

    def loss(x: Tensor, rounded: Tensor) -> Tensor:
        difference = (x - rounded).reshape(-1, spans, span).transpose(0, 1)
        by_row = ((difference @ parts) * difference).sum(-1).T
        rows = block_counts(x.shape, block)[0]
        return by_row.reshape(rows, -1, spans).sum(1)

    return loss


def encode_by_rows(grid: Grid, x: Tensor) -> Tensor:
    """`grid.encode`, some rows at a time where no block spans rows."""
    if grid.block[0] != 1 or x.shape[0] == 0:
        return grid.encode(x)
    codes = torch.empty(x.shape, dtype=grid.format.storage, device=x.device)
    rows = max(1, _SLAB_ELEMENTS // max(1, x.shape[1]))
    for i in range(0, len(x), rows):
        codes[i : i + rows] = _rows(grid, i, i + rows).encode(x[i : i + rows])
    return codes


def encoded(x: Tensor, options: WeightOptions, loss: Loss | None = None) -> tuple[Grid, Tensor]:
    """Grid and codes of a weight [out, in], or of a stack [E, out, in] of weights one by one."""
    if x.dim() == 3:
        stack = Stack(len(x))
        for weight in x:
            stack.add(*encoded(weight, options, loss))
        return stack.encoded()
    grid = choose_grid(x, options, loss)
    return grid, encode_by_rows(grid, x)


class Stack:
    """Grids and codes of weights of one shape and format, which come one after the other."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._grids: list[Grid] = []
        self._codes = torch.empty(0)

    def add(self, grid: Grid, codes: Tensor) -> None:
        """Take in the next weight."""
        if not self._grids:  # not a list of codes: their stack would hold all of them twice
            self._codes = codes.new_empty(self._count, *codes.shape)
        self._codes[len(self._grids)] = codes
        self._grids.append(grid)

    def encoded(self) -> tuple[Grid, Tensor]:
        """Grid and codes [E, out, in] of all."""
        first = self._grids[0]
        zeros = [grid.zero_point for grid in self._grids if grid.zero_point is not None]
        grid = Grid(
            first.format,
            [1, *first.block],
            torch.stack([grid.scale for grid in self._grids]),
            torch.stack(zeros) if zeros else None,
            first.low,
            first.high,
        )
        return grid, self._codes


def _rows(grid: Grid, first: int, last: int) -> Grid:
    zero = None if grid.zero_point is None else grid.zero_point[first:last]
    return Grid(grid.format, grid.block, grid.scale[first:last], zero, grid.low, grid.high)


def _grid_of(x: Tensor, options: WeightOptions, low: int, high: int, loss: Loss | None) -> Grid:
    block = options.block
    scale, zero_point = ops.choose_qparams(x, block, options.symmetric, low, high)
    # Between q_min and q_max, as zero always lies in the range.
    zero = None if options.symmetric else zero_point.to(torch.int8)
    grid = Grid(options.format, block, scale, zero, low, high)
    if options.range == "absmax":
        return grid
    judged = loss if options.range == "output" else None
    return _least_loss(x, grid, judged or _squared_error(block))


def _least_loss(x: Tensor, grid: Grid, loss: Loss) -> Grid:
    """Shrinking the range moves no zero point: low / scale stays what it is."""
    best = torch.full_like(grid.scale, torch.inf)
    chosen = grid.scale
    least = torch.finfo(torch.float32).tiny
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    for share in _SHRINK:
        scale = (grid.scale * share).clamp(min=least)
        tried = Grid(grid.format, grid.block, scale, grid.zero_point, grid.low, grid.high)
        cost = loss(wide, tried.round(wide))
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, scale, chosen)
    return Grid(grid.format, grid.block, chosen, grid.zero_point, grid.low, grid.high)


def sum_blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """The sum of each block of a matrix [out, in], [out / block, in / block]."""
    rows, columns = block_counts(x.shape, block)
    height = x.shape[0] // max(1, rows)
    return x.reshape(rows, height, columns, x.shape[1] // columns).sum((1, 3))
