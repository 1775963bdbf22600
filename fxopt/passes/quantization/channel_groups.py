"""Divide channels into groups of one size so that the ranges of the groups are small.

    minimize  sum_g (max over g of high - min over g of low)^2

A step of rounding is in proportion to the range, and the squared error to its square. Channels
sorted by range put those that reach far up and those that reach far down into one group, which then
is twice as wide as either; sorted by the middle of their range they are apart. From either order
channels of two groups are exchanged while the sum falls.

Shapes: low <= 0 <= high [d]; K groups of d / K.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[Any]
Place = tuple[int, int]  # group and place in it

# Exchanges that gain less than this share are not worth one.
_LEAST_GAIN = 1e-6


def group_ranges(low: Tensor, high: Tensor, groups: int) -> Tensor:
    """The range of each group of channels that follow each other, [groups]."""
    return high.reshape(groups, -1).amax(1) - low.reshape(groups, -1).amin(1)


def least_ranges(low: Tensor, high: Tensor, groups: int) -> Tensor:
    """The order of channels [d] whose groups have the smallest ranges that were found.

    Exchanges stop at a local minimum, so they start twice: from channels sorted by range, and by
    where the middle of their range lies. Ranges as far up as down are best sorted as they are.
    """
    starts = [(high - low).argsort(stable=True), (high + low).argsort(stable=True)]
    orders = [exchanged(low, high, start, groups) for start in starts]
    first, second = (float(group_ranges(low[o], high[o], groups).square().sum()) for o in orders)
    return orders[second < (1 - _LEAST_GAIN) * first]


def exchanged(low: Tensor, high: Tensor, order: Tensor, groups: int) -> Tensor:
    """An order [d] whose groups have smaller ranges than those of `order`, if exchanges find one.

    A group's range falls only if one of the two channels that span it leaves, so those are tried
    against every channel of every other group.
    """
    table: Matrix = order.reshape(groups, -1).numpy().copy()
    lows, highs = low.double().numpy(), high.double().numpy()
    while (best := _best_exchange(lows[table], highs[table])) is not None:
        one, other = best
        table[one], table[other] = table[other], table[one]
    return torch.from_numpy(table.flatten())


def _best_exchange(low: Matrix, high: Matrix) -> tuple[Place, Place] | None:
    """The two channels of [groups, size] whose exchange lowers the sum most; None if none does."""
    others_low, others_high = -_largest_other(-low), _largest_other(high)
    squares = (high.max(1) - low.min(1)) ** 2
    best, most = None, _LEAST_GAIN * squares.sum()
    for group in range(len(low)):
        for place in {int(low[group].argmin()), int(high[group].argmax())}:
            one = group, place
            # This group with each other channel in that place, and theirs with this channel.
            mine = np.maximum(others_high[one], high) - np.minimum(others_low[one], low)
            theirs = np.maximum(others_high, high[one]) - np.minimum(others_low, low[one])
            gains = squares[group] + squares[:, None] - mine**2 - theirs**2
            gains[group] = 0
            index = int(gains.argmax())
            if gains.flat[index] > most:
                most, best = gains.flat[index], (one, divmod(index, low.shape[1]))
    return best


def _largest_other(values: Matrix) -> Matrix:
    """At each place the largest of zero, which ranges hold, and the rest of its row."""
    rows, places = np.arange(len(values)), values.argmax(1)
    found = np.repeat(values[rows, places][:, None], values.shape[1], 1)
    rest = np.pad(values, ((0, 0), (0, 1)))
    rest[rows, places] = 0
    found[rows, places] = rest.max(1)
    return found
