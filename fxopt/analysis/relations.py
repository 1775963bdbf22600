"""What the operators of a program say about the coordinates of its axes, for one kind of change.

Every axis that has a fixed size is a row of coordinates, and every coordinate a label: an integer
that stands for "how this coordinate is changed" (its factor, its place, its part in a rotation).
Walking the graph, each operator's rule relates labels:

    couple(a, b)            both change alike (or inversely: the factors multiply to one)
    product(out, a, b)      the factor of `out` is the product of those of `a` and `b`
    fix(a, reason)          may not change
    row(a)                  the coordinates of a row may change places only among themselves

Views move labels about and relate nothing. Labels of a value have one axis per axis of the value;
an axis of length 1 means that the label does not depend on that axis (batch, sequence).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node

from fxopt.ir.program import Program, module_path

Labels = npt.NDArray[np.int64]

# The label of what cannot change: inputs, positions, masks, tables.
FIXED = 0
# Parameters that are added or multiplied elementwise get a label per element up to this size, and
# one per element of the last axis beyond it.
_GRID_ELEMENTS = 1 << 16


class Kind(enum.Enum):
    """How the basis of an axis is changed."""

    SCALE = "scale"  # each coordinate by a positive factor
    SIGN = "sign"  # each coordinate by +1 or -1
    PERMUTE = "permute"  # coordinates change places
    ROTATE = "rotate"  # blocks of coordinates are multiplied by an orthogonal matrix
    CENTRE = "centre"  # the mean over the axis is subtracted
    SLICE = "slice"  # coordinates are removed; legal places are those of PERMUTE


class Unit(enum.Enum):
    """What changes place as one: a channel, all channels of a head, or of a kv head's group."""

    CHANNEL = "channel"
    HEAD = "head"
    GROUP = "group"


@dataclass(frozen=True)
class Reason:
    """Why coordinates may not change: the operator that says so, and what it says."""

    node: str
    path: str
    text: str

    def __str__(self) -> str:
        where = self.path or self.node
        return f"{self.text} ({where})" if where else self.text


@dataclass(frozen=True)
class Entry:
    """A tensor some of whose axes change with their labels.

    `role` is "weight", "input" or "output" (the cache; outputs that are to be restored), or
    "operand": the argument of a node, in front of which an index can be put.
    """

    role: str
    name: str
    axes: tuple[int, ...]
    labels: Labels  # one per element of the flattened axes
    offset: float = 0.0  # the weight is used as weight + offset
    operand: int = -1


@dataclass
class Relations:
    """Collects labels and relations while the rules walk over a program."""

    program: Program
    kind: Kind
    unit: Unit = Unit.CHANNEL
    count: int = 1  # label 0 is FIXED
    entries: list[Entry] = field(default_factory=list[Entry])
    weights: dict[str, list[Entry]] = field(default_factory=dict[str, list[Entry]])
    couplings: list[tuple[Labels, Labels, bool]] = field(
        default_factory=list[tuple[Labels, Labels, bool]]
    )
    products: list[tuple[Labels, Labels, Labels]] = field(
        default_factory=list[tuple[Labels, Labels, Labels]]
    )
    fixes: list[tuple[Labels, Reason]] = field(default_factory=list[tuple[Labels, Reason]])
    rows: list[Labels] = field(default_factory=list[Labels])
    tags: list[tuple[Labels, str]] = field(default_factory=list[tuple[Labels, str]])
    values: dict[Node, Any] = field(default_factory=dict[Node, Any])
    from_weights: set[Node] = field(default_factory=set[Node])  # computed from weights alone
    node: Node | None = None  # the one whose rule is running

    # --- labels -----------------------------------------------------------------------------

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels, all different."""
        size = int(np.prod(shape, dtype=np.int64))
        start, self.count = self.count, self.count + size
        return np.arange(start, start + size, dtype=np.int64).reshape(tuple(shape))

    def fixed(self, rank: int) -> Labels:
        """The labels of a value that cannot change."""
        return np.full((1,) * rank, FIXED, dtype=np.int64)

    def labels(self, value: Any) -> Labels:
        """The labels of a node's tensor; a weight read elementwise gets a label per element."""
        if value in self.values:
            return self.values[value]
        if value.op == "get_attr":
            return self.elementwise_weight(value)
        return self.fixed(len(sizes(value)))

    def elementwise_weight(self, node: Node, offset: float = 0.0) -> Labels:
        """The labels of a weight that is combined element by element."""
        shape = sizes(node)
        wide = int(np.prod([size or 1 for size in shape], dtype=np.int64)) > _GRID_ELEMENTS
        last = len(shape) - 1
        axes = tuple(
            axis for axis, size in enumerate(shape) if size != 1 and (axis == last or not wide)
        )
        if not axes:  # a single number is no axis, and often no weight but a constant of the model
            return self.fixed(len(shape))
        held = self.weight_axes(node, axes, offset)
        full = [(size or 1) if axis in axes else 1 for axis, size in enumerate(shape)]
        return held.reshape(full)

    def weight_axes(self, node: Any, axes: tuple[int, ...], offset: float = 0.0) -> Labels:
        """The labels [sizes of the axes] along axes of a weight, shared by all its readers."""
        name = str(node.target)
        value = node.meta["val"]
        shape = [int(value.shape[axis]) for axis in axes]
        if not value.is_floating_point():
            return np.full(shape, FIXED, dtype=np.int64)
        known = self.weights.setdefault(name, [])
        for entry in known:
            if entry.axes == axes and entry.offset == offset:
                return entry.labels.reshape(shape)
        # A weight of one number has no axis, and every reader means the same number.
        clashes = [e for e in known if not (axes and e.axes) or set(e.axes) & set(axes)]
        for entry in clashes:
            self.fix(entry.labels, f"{name} is read in two ways that do not agree")
        if clashes:
            return np.full(shape, FIXED, dtype=np.int64)
        labels = self.fresh(shape)
        known.append(Entry("weight", name, axes, labels.reshape(-1), offset))
        self.entries.append(known[-1])
        if axes:
            self.row(labels.reshape(1, -1))
        return labels

    # --- relations --------------------------------------------------------------------------

    def couple(self, a: Labels, b: Labels, inverse: bool = False, why: str = "") -> None:
        """Both change alike; what is fixed on one side fixes the other."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        text = why or "it is combined with a value that no weight can change"
        for mine, other in ((a, b), (b, a)):
            stuck = mine[(other == FIXED) & (mine != FIXED)]
            if stuck.size:
                self.fix(stuck, text)
        free = (a != FIXED) & (b != FIXED) & ((a != b) | inverse)
        if free.any():
            self.couplings.append((a[free], b[free], inverse))

    def product(self, out: Labels, a: Labels, b: Labels) -> None:
        """The factor of `out` is that of `a` times that of `b`."""
        out, a, b = np.broadcast_arrays(out, a, b)
        self.products.append((out.reshape(-1), a.reshape(-1), b.reshape(-1)))

    def fix(self, labels: Labels, text: str) -> None:
        """These may not change; the reason is written for the user."""
        labels = np.unique(labels)
        labels = labels[labels != FIXED]
        if labels.size:
            node = self.node
            name, path = ("", "") if node is None else (node.name, module_path(node))
            self.fixes.append((labels, Reason(name, path, text)))

    def row(self, labels: Labels) -> None:
        """Rows [rows, n]: coordinates that an operator takes as one set."""
        if labels.size and (labels != FIXED).any():
            self.rows.append(np.ascontiguousarray(labels))

    def tag(self, labels: Labels, word: str) -> None:
        """Remember what kind of axis this is: "residual", "query_key", "value", "gain"."""
        self.tags.append((np.unique(labels), word))

    def behind(self, labels: Labels) -> Labels:
        """New labels for the same coordinates behind an operator; they change alike.

        What went through an operator and what did not are so told apart, and from there on the
        copies of a coordinate, each of which may meet a weight of its own.
        """
        moving = labels != FIXED
        after = np.full(labels.shape, FIXED, dtype=np.int64)
        after[moving] = self.fresh([int(moving.sum())])
        self.couple(labels, after)
        return after

    def collapse(self, labels: Labels, axis: int) -> Labels:
        """The same labels, made independent of an axis."""
        if labels.shape[axis] == 1:
            return labels
        first = np.take(labels, [0], axis)
        self.couple(first, labels)
        return first


def sizes(value: Any) -> list[int | None]:
    """The shape of a node's tensor; None where a size varies."""
    recorded = value.meta.get("val")
    if not isinstance(recorded, torch.Tensor):
        return []
    return [size if type(size) is int else _known(size) for size in recorded.shape]


def hints(value: Any) -> list[int] | None:
    """The shape of a node's tensor at the sizes of the capture; None if one depends on values."""
    shape = value.meta["val"].shape
    found = [size if type(size) is int else size.node.hint for size in shape]
    return None if None in found else [int(size) for size in found]


def _known(size: Any) -> int | None:
    return size.node.maybe_as_int()
