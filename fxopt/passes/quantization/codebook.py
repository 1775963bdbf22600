"""A small table of values for a weight, and the outliers that keep their own (GOBO).

    outlier: log N(w; mu, sigma^2) < threshold,    mu and sigma those of the whole weight
    start:   2^bits bins with equally many weights, their means the table
    repeat:  assign each weight to the nearest value, table_k = mean of those assigned to k,
             while sum |w - table[code]| falls

Shapes: w any; table [2^bits], ascending; mask of outliers like w.
Exactness: outliers are kept to the bit. Codes of a w + c are those of w for a > 0 where the
    threshold moves along, by -log a: it is a density, in the unit of the weights.
Source: Zadeh et al., GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy
    Efficient Inference, MICRO 2020, arXiv:2005.03842.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Weights that are encoded at a time; comparing in float64 takes eight bytes for each.
_SLAB_ELEMENTS = 1 << 18


def outlier_mask(weight: Tensor, threshold: float) -> Tensor:
    """Which weights have a log-density below `threshold` in the Gaussian fitted to all of them."""
    # A constant has no density; its mean need not be exact, so that sigma is no test for it.
    if weight.numel() == 0 or bool(weight.min() == weight.max()):
        return torch.zeros_like(weight, dtype=torch.bool)
    mean = float(weight.mean(dtype=torch.float64))
    square = sum(
        float((part.double() - mean).square().sum())
        for part in weight.flatten().split(_SLAB_ELEMENTS)
    )
    sigma = math.sqrt(square / weight.numel())
    # log N = -(w - mu)^2 / (2 sigma^2) - log(sigma sqrt(2 pi)), solved for |w - mu|
    reach = -2 * (threshold + math.log(sigma) + math.log(2 * math.pi) / 2)
    if reach < 0:
        return torch.ones_like(weight, dtype=torch.bool)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) - mean).abs() > sigma * math.sqrt(reach)


@dataclass(frozen=True)
class Codebook:
    """A learned table, and the L1 error of each table on the way to it."""

    table: Tensor  # [2^bits] float64, ascending
    errors: tuple[float, ...]  # falling; the last one is the table's

    def encode(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The code of the value nearest to each weight, among the values rounded to `dtype`."""
        table = self.table.to(dtype or self.table.dtype).double()
        middles = (table[1:] + table[:-1]) / 2
        parts = weight.flatten().split(_SLAB_ELEMENTS)
        codes = [torch.bucketize(part.double(), middles).to(torch.uint8) for part in parts]
        return torch.cat(codes).reshape(weight.shape)


def learn_codebook(values: Tensor, bits: int) -> Codebook:
    """The table for `values` [n], n > 0, whose L1 error is the least that was met."""
    ranked = _Ranked(values)
    count = 1 << bits
    table = ranked.means([round(k * ranked.count / count) for k in range(count + 1)], None)
    edges, error = ranked.assign(table)
    errors = [error]
    while True:
        moved = ranked.means(edges, table)
        edges, error = ranked.assign(moved)
        if not error < errors[-1]:
            return Codebook(table, tuple(errors))
        table = moved
        errors.append(error)


class _Ranked:
    """Values in ascending order with their running sums: a bin is a range, its sum a difference."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.flatten().sort().values
        self.count = len(self.values)
        sums = self.values.cumsum(0, dtype=torch.float64)
        self.sums = torch.cat([sums.new_zeros(1), sums])

    def sum(self, first: int, last: int) -> float:
        return float(self.sums[last] - self.sums[first])

    def means(self, edges: list[int], former: Tensor | None) -> Tensor:
        """The mean of each bin; an empty one keeps its former value, or takes that at its edge."""
        means: list[float] = []
        for k, (first, last) in enumerate(pairwise(edges)):
            if first < last:
                # A mean lies between the ends of its bin; running sums are rounded.
                mean = self.sum(first, last) / (last - first)
                low, high = float(self.values[first]), float(self.values[last - 1])
                means.append(min(max(mean, low), high))
            elif former is not None:
                means.append(float(former[k]))
            else:
                means.append(float(self.values[min(first, self.count - 1)]))
        return torch.tensor(means, dtype=torch.float64)

    def assign(self, table: Tensor) -> tuple[list[int], float]:
        """The edges of the bins of weights nearest to each value, and their L1 distance."""
        edges = [0, *self._ranks((table[1:] + table[:-1]) / 2), self.count]
        centres = self._ranks(table)
        error = 0.0
        for (first, last), centre, value in zip(
            pairwise(edges), centres, table.tolist(), strict=True
        ):
            middle = min(max(centre, first), last)
            below = value * (middle - first) - self.sum(first, middle)
            above = self.sum(middle, last) - value * (last - middle)
            error += below + above
        return edges, error

    def _ranks(self, bounds: Tensor) -> list[int]:
        """How many values are at most each bound."""
        every = range(self.count)
        # As Python numbers: a tensor would compare in its own, narrower dtype.
        return [bisect_right(every, bound, key=self._value) for bound in bounds.tolist()]

    def _value(self, rank: int) -> float:
        return float(self.values[rank])
