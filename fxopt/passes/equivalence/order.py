"""Choose in which order the coordinates of a hidden axis stand.

    cost = sum over rows and groups of (max |w| in the group)^2

is what rounding in groups of consecutive coordinates costs; sorting by range makes it small, and a
search by exchanges makes it smaller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.analysis.symmetry import Edit, Symmetry
from fxopt.analysis.transform import random_orders
from fxopt.errors import RecipeError
from fxopt.ir.program import Program

_PROPOSALS_PER_COORDINATE = 8


def choose_order(
    program: Program,
    symmetry: Symmetry,
    by: str,
    group: int,
    seed: int,
    given: Sequence[int] | None,
) -> Tensor:
    """An order [blocks, size]: coordinate c takes what stood at order[c].

    Args:
        program: whose weights are looked at.
        symmetry: the axis.
        by: "range" (smallest reach first), "search" (exchanges that lower the cost), "random" or
            "given".
        group: how many consecutive coordinates will share a scale.
        seed: for "random" and "search".
        given: the order, for "given": one for all blocks, or all blocks one after the other.

    Raises:
        RecipeError: the given order does not fit.
    """
    if by == "given":
        return _given(symmetry, given)
    if by == "random":
        return random_orders(symmetry, seed)
    reach = reach_of(program, symmetry)  # [rows, blocks, size]
    order = reach.amax(0).argsort(dim=1, stable=True)
    return order if by == "range" else _search(reach, order, group, seed)


def _given(symmetry: Symmetry, given: Sequence[int] | None) -> Tensor:
    order = torch.tensor(list(given or ()), dtype=torch.int64)
    if order.numel() == symmetry.size:
        order = order.expand(symmetry.blocks, -1)
    wanted = torch.arange(symmetry.size).expand(symmetry.blocks, -1)
    fits = order.numel() == symmetry.blocks * symmetry.size
    order = order.reshape(symmetry.blocks, symmetry.size) if fits else order
    if not fits or not torch.equal(order.sort(1).values, wanted):
        raise RecipeError(
            f"the order given for {symmetry.path!r} has {order.numel()} entries; needed is a "
            f"permutation of 0..{symmetry.size - 1}, once or for each of {symmetry.blocks} blocks."
        )
    return order


def reach_of(program: Program, symmetry: Symmetry) -> Tensor:
    """|w| of what reads the axis, [rows, blocks, size]; of what writes it where nothing reads."""
    reading = [edit for edit in symmetry.weights if edit.axes[-1] > 0]
    chosen = reading or list(symmetry.weights)
    return torch.cat([_rows(program.weight(edit.name), edit) for edit in chosen])


def _rows(value: Tensor, edit: Edit) -> Tensor:
    axes = len(edit.axes)
    flat = value.detach().float().abs().movedim(edit.axes, list(range(axes))).flatten(0, axes - 1)
    flat = flat.reshape(flat.shape[0], -1)
    picked = flat[torch.from_numpy(edit.positions)]  # [blocks, size, unit, rows]
    return picked.flatten(2).movedim(2, 0)


def group_cost(reach: Tensor, order: Tensor, group: int) -> Tensor:
    """The cost of each group, [blocks, groups]; the last group may be smaller."""
    rows, blocks, size = reach.shape
    sorted_reach = reach.gather(2, order.expand(rows, -1, -1))
    pad = -size % group
    padded = torch.nn.functional.pad(sorted_reach, (0, pad))
    return padded.reshape(rows, blocks, -1, group).amax(3).square().sum(0)


def _search(reach: Tensor, order: Tensor, group: int, seed: int) -> Tensor:
    """Exchange coordinates of two groups while that lowers the cost; never worse than sorted."""
    generator = torch.Generator().manual_seed(seed)
    order = order.clone()
    size = order.shape[1]
    if size <= group:
        return order
    for block in range(order.shape[0]):
        held = reach[:, block, :]
        for _ in range(_PROPOSALS_PER_COORDINATE * size):
            i, j = torch.randint(size, (2,), generator=generator).tolist()
            a, b = i // group * group, j // group * group
            if a == b:
                continue
            spans = (slice(a, a + group), slice(b, b + group))
            before = sum(_cost(held, order[block, span]) for span in spans)
            _exchange(order, block, i, j)
            if sum(_cost(held, order[block, span]) for span in spans) >= before:
                _exchange(order, block, i, j)
    return order


def _cost(reach: Tensor, members: Tensor) -> float:
    return float(reach[:, members].amax(1).square().sum())


def _exchange(order: Tensor, block: int, i: int, j: int) -> None:
    first = int(order[block, i])
    order[block, i] = order[block, j]
    order[block, j] = first
