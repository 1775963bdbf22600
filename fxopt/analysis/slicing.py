"""Follow coordinates that are removed through every tensor of a program.

    kept[..., n]  with the same count along one axis:   size n -> count

Shapes: labels of any value; one axis of it becomes shorter, at each place of the axes before it by
    coordinates of its own (heads of a kv group, neurons of an expert).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.relations import FIXED, Entry, Labels
from fxopt.analysis.symmetry import Symmetries, Symmetry
from fxopt.errors import AnalysisError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """One axis of a tensor loses coordinates; `kept` has a place per label."""

    axis: int
    kept: Mask
    count: int

    def before(self, position: int) -> int:
        """How many coordinates in front of a position stay.

        Raises:
            AnalysisError: not the same number everywhere.
        """
        counts = np.take(self.kept, range(position), self.axis).sum(self.axis)
        if not (counts == counts.flat[0]).all():
            raise AnalysisError("a bound lies between coordinates that differ from part to part")
        return int(counts.flat[0])

    def apply(self, value: Tensor, axes: tuple[int, ...]) -> Tensor:
        """A tensor without the removed coordinates; `axes` are those that `kept` has."""
        leading = list(range(len(axes)))
        shape = list(self.kept.shape)
        shape[self.axis] = self.count
        left = value.detach().movedim(axes, leading)[torch.from_numpy(self.kept)]
        return left.unflatten(0, shape).movedim(leading, axes).contiguous()


@dataclass(frozen=True)
class Removal:
    """Which classes of coordinates are removed, out of an analysis for SLICE."""

    found: Symmetries
    removed: Mask

    def gone(self, labels: Labels) -> Mask:
        """Which of these labels are removed."""
        classes = self.found.classes
        assert classes is not None  # noqa: S101 - symmetries() always keeps them
        return self.removed[classes.of[labels]] & (labels != FIXED)

    def cut(self, labels: Labels) -> Cut | None:
        """What a value with these labels loses.

        Raises:
            AnalysisError: what is left of it is no tensor.
        """
        gone = self.gone(labels)
        if not gone.any():
            return None
        for axis in reversed([axis for axis in range(gone.ndim) if gone.shape[axis] > 1]):
            behind = tuple(range(axis + 1, gone.ndim))
            counts = (~gone).sum(axis)
            alike = bool((gone.any(behind) == gone.all(behind)).all())
            if alike and (counts == counts.flat[0]).all() and counts.flat[0] > 0:
                return Cut(axis, ~gone, int(counts.flat[0]))
        raise AnalysisError("not the same number is left in every part of a value")

    def of_node(self, node: Any) -> Any:
        """What a node's result loses: a Cut, None, or a list of them for several results."""
        relations = self.found.relations
        assert relations is not None  # noqa: S101 - symmetries() always keeps them
        held = relations.values.get(node) if isinstance(node, Node) else None
        if held is None:
            return None
        return [self.cut(part) for part in held] if isinstance(held, list) else self.cut(held)

    def entries(self) -> list[tuple[Entry, Cut]]:
        """The weights and caches that lose coordinates."""
        relations = self.found.relations
        assert relations is not None  # noqa: S101 - symmetries() always keeps them
        result: list[tuple[Entry, Cut]] = []
        for entry in relations.entries:
            if entry.role not in ("weight", "input"):
                if self.gone(entry.labels).any():
                    raise AnalysisError("an index in the graph would have to follow")
                continue
            cut = self.cut(entry.labels.reshape(entry_shape(relations.program, entry)))
            if cut is not None:
                result.append((entry, cut))
        return result


def entry_shape(program: Any, entry: Entry) -> list[int]:
    """The sizes of the axes that an entry is about."""
    if entry.role == "weight":
        shape: Any = program.weight(entry.name).shape
    else:
        node = next(n for n in program.graph.nodes if n.name == entry.name)
        shape = node.meta["val"].shape
    return [int(shape[axis]) for axis in entry.axes]


def removal(found: Symmetries, kept: Iterable[tuple[Symmetry, Tensor]]) -> Removal:
    """Remove from each symmetry all coordinates but those kept, [blocks, count] of integers."""
    assert found.classes is not None  # noqa: S101 - symmetries() always keeps them
    assert found.relations is not None  # noqa: S101
    removed = np.zeros(found.classes.reason.size, dtype=np.bool_)
    for symmetry, coordinates in kept:
        edit = symmetry.weights[0]
        entry = next(
            e
            for e in found.relations.entries
            if (e.role, e.name, e.axes) == (edit.role, edit.name, edit.axes)
        )
        members = found.classes.of[entry.labels[edit.positions[:, :, 0]]]
        gone = np.ones(members.shape, dtype=np.bool_)
        np.put_along_axis(gone, coordinates.numpy(), False, 1)
        removed[members[gone]] = True
    return Removal(found, removed)
