"""Where the heads of attention stand in weights, found by which heads may change places.

    out = concat_h(softmax(q_h k_g(h)^T) v_g(h)) Wo^T is a sum over heads: rows of Wq, Wk, Wv and
    columns of Wo that belong to one head change places together

Shapes: W [out, in]; a head is `size` consecutive rows (axis 0) or columns (axis 1).
"""

from dataclasses import dataclass

import numpy as np

from fxopt.analysis.axis import Symmetry
from fxopt.analysis.relations import Kind, Labels, Unit
from fxopt.analysis.symmetry import symmetries
from fxopt.ir.program import Program


@dataclass(frozen=True)
class HeadAxis:
    """The axis of a weight along which heads stand, and how many coordinates one has."""

    axis: int
    size: int


def head_axes(program: Program) -> dict[str, HeadAxis]:
    """The heads of each matrix that has an axis of them, by the weight's name.

    A fused weight has the heads of queries, keys and values; the shortest run of coordinates that
    move together is one head of one of them. Keys and values that all query heads share are one
    head and have no such axis.
    """
    found: dict[str, HeadAxis] = {}
    # Key and value heads that several query heads share move only as a group.
    for unit in (Unit.HEAD, Unit.GROUP):
        for symmetry in symmetries(program, Kind.PERMUTE, unit).of_role("heads"):
            size = _head_size(symmetry)
            for edit in symmetry.weights:
                matrix = len(program.weight(edit.name).shape) == 2
                if matrix and len(edit.axes) == 1:
                    found.setdefault(edit.name, HeadAxis(edit.axes[0], size))
    return found


def _head_size(symmetry: Symmetry) -> int:
    """The shortest run of consecutive coordinates of a head in any weight."""
    return min(_shortest_run(edit.positions) for edit in symmetry.weights)


def _shortest_run(positions: Labels) -> int:
    places = np.sort(positions.reshape(-1, positions.shape[-1]), axis=1)
    heads, coordinate = np.nonzero(np.diff(places, axis=1) != 1)
    starts = [np.concatenate(([0], coordinate[heads == h] + 1)) for h in np.unique(heads)]
    if not starts:
        return positions.shape[-1]
    return min(int(np.diff(np.append(s, positions.shape[-1])).min()) for s in starts)
