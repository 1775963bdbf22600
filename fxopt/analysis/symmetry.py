"""Find every hidden axis whose basis may be changed without changing the function.

A symmetry is a set of edits: tensors, and where along their axes the coordinates of one hidden
axis stand. `symmetries(program, kind)` derives them from the op rules by dataflow alone.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from fxopt.analysis import op_rules
from fxopt.analysis.classes import Classes, solve
from fxopt.analysis.relations import (
    FIXED,
    Entry,
    Kind,
    Labels,
    Reason,
    Relations,
    Unit,
    sizes,
)
from fxopt.ir.program import Program, Refusal

Signatures = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Edit:
    """One tensor that changes with a symmetry.

    `positions` [blocks, size, unit] says where along the flattened `axes` the coordinates stand:
    coordinate c of block b stands at positions[b, c, u] for every u. `inverse` tensors change
    inversely (they are divided where others are multiplied).
    """

    role: str  # "weight", "input", "output" or "operand"
    name: str
    axes: tuple[int, ...]
    positions: Labels
    inverse: bool = False
    offset: float = 0.0
    operand: int = -1

    def __str__(self) -> str:
        axes = ",".join(str(axis) for axis in self.axes)
        unit = self.positions.shape[2]
        wide = f" x{unit}" if unit > 1 else ""
        mark = "/" if self.inverse else ""
        where = f"{self.name}:{self.operand}" if self.role == "operand" else self.name
        return f"{mark}{where}[{axes}]{wide}"


@dataclass(frozen=True)
class Symmetry:
    """A hidden axis: `blocks` independent blocks of `size` coordinates, and all that follows it."""

    kind: Kind
    unit: Unit
    blocks: int
    size: int
    edits: tuple[Edit, ...]
    tags: frozenset[str] = frozenset()

    @property
    def role(self) -> str:
        """What kind of axis it is, told by the operators it passes through."""
        for name in ("heads", "residual", "query_key", "value"):
            if name in self.tags:
                return name
        return "hidden"

    @property
    def weights(self) -> tuple[Edit, ...]:
        """The edits of weights."""
        return tuple(edit for edit in self.edits if edit.role == "weight")

    @property
    def path(self) -> str:
        """A short name for reports: the module that first writes the axis."""
        return self.weights[0].name.rpartition(".")[0] if self.weights else ""

    def __str__(self) -> str:
        shape = f"{self.blocks} x {self.size}" if self.blocks > 1 else f"{self.size}"
        return f"{self.role} ({shape}): {', '.join(str(edit) for edit in self.edits)}"


@dataclass
class Symmetries:
    """All symmetries of one kind, and the axes that have none, with the reason."""

    kind: Kind
    unit: Unit
    found: list[Symmetry] = field(default_factory=list[Symmetry])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    reasons: dict[str, str] = field(default_factory=dict[str, str])  # by weight, where it is fixed
    # What they were found by; a slice follows its coordinates through every node.
    relations: Relations | None = field(default=None, repr=False)
    classes: Classes | None = field(default=None, repr=False)

    def __iter__(self) -> Any:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def of_role(self, *roles: str) -> list[Symmetry]:
        """Those of some roles."""
        return [symmetry for symmetry in self.found if symmetry.role in roles]

    def __str__(self) -> str:
        head = f"{self.kind.value} by {self.unit.value}: {len(self.found)} symmetries"
        lines = [head, *(f"  {symmetry}" for symmetry in self.found)]
        if self.refusals:
            lines.append(f"refused: {len(self.refusals)}")
            lines += [f"  {refusal.site}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)


def symmetries(
    program: Program,
    kind: Kind,
    unit: Unit = Unit.CHANNEL,
    restored: frozenset[str] = frozenset(),
) -> Symmetries:
    """Every symmetry of a kind.

    Args:
        program: a canonical program; it is not changed.
        kind: how the basis of an axis is changed.
        unit: what changes place as one (for PERMUTE and SLICE).
        restored: names of outputs that will be brought back to their own basis.
    """
    relations = relate(program, kind, unit, restored)
    classes = solve(relations)
    grouping = _Grouping(relations, classes)
    result = Symmetries(kind, unit, relations=relations, classes=classes)
    result.found = grouping.symmetries()
    result.refusals, result.reasons = grouping.refusals()
    return result


def relate(
    program: Program, kind: Kind, unit: Unit, restored: frozenset[str] = frozenset()
) -> Relations:
    """Walk over a program and let each operator's rule speak."""
    relations = Relations(program, kind, unit)
    states = _states(program)
    for node in program.graph.nodes:
        relations.node = node
        if node.op == "placeholder":
            relations.values[node] = _input(relations, node, node.name in states)
        elif node.op == "call_function":
            relations.values[node] = _call(relations, node)
        elif node.op == "output":
            _outputs(relations, node, states, restored)
    relations.node = None
    return relations


def _states(program: Program) -> dict[str, int]:
    """Inputs of the cache by name, with the index of the output that goes on from each."""
    cache = program.signature.cache
    if cache is None:
        return {}
    count = 2 * cache.layers
    inputs = [node.name for node in program.graph.nodes if node.op == "placeholder"][-count:]
    first = len(program.signature.outputs) - count
    return {name: first + index for index, name in enumerate(inputs)}


def _input(relations: Relations, node: Node, state: bool) -> Labels:
    shape = sizes(node)
    if not state:
        return relations.fixed(len(shape))
    axes = tuple(axis for axis, size in enumerate(shape) if size not in (None, 1))
    labels = relations.fresh([shape[axis] or 1 for axis in axes])
    relations.entries.append(Entry("input", node.name, axes, labels.reshape(-1)))
    full = labels.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])  # type: ignore[arg-type]
    if relations.unit is not Unit.CHANNEL and relations.kind is not Kind.SCALE and len(axes) > 1:
        for axis in axes[1:]:
            full = relations.collapse(full, axis)
    return full


def _call(relations: Relations, node: Node) -> Any:
    rule = op_rules.rule_of(node.target)
    operands = node.all_input_nodes
    loose = any(_changes(relations, operand) for operand in operands)
    if rule is not None and loose:
        return rule(relations, node)
    for operand in operands if loose else ():
        held = relations.values.get(operand)
        for labels in held if isinstance(held, list) else [relations.labels(operand)]:
            relations.fix(labels, f"{node.target} has no op rule")
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [relations.fixed(getattr(part, "ndim", 0)) for part in value]
    return relations.fixed(len(sizes(node)))


def _changes(relations: Relations, operand: Node) -> bool:
    if operand.op == "get_attr":
        return bool(operand.meta["val"].is_floating_point())
    held = relations.values.get(operand)
    parts = held if isinstance(held, list) else [] if held is None else [held]
    return any((labels != FIXED).any() for labels in parts)


def _outputs(
    relations: Relations, node: Node, states: dict[str, int], restored: frozenset[str]
) -> None:
    results: Any = node.args[0]
    specs = relations.program.signature.outputs
    owners = {index: name for name, index in states.items()}
    for index, (value, spec) in enumerate(zip(results, specs, strict=True)):
        if not isinstance(value, Node) or not sizes(value):
            continue
        labels = relations.labels(value)
        axes = tuple(axis for axis, size in enumerate(labels.shape) if size > 1)
        if index in owners:
            _carry_on(relations, owners[index], value, labels)
        elif spec.name in restored and len(axes) == 1:
            relations.entries.append(Entry("output", spec.name, axes, labels.reshape(-1)))
        else:
            relations.fix(labels, f"it is the model's output {spec.name!r}")


def _carry_on(relations: Relations, name: str, value: Node, labels: Labels) -> None:
    """What a cache gives back has the axes of what it takes."""
    past = next(n for n in relations.program.graph.nodes if n.name == name)
    relations.couple(relations.values[past], labels)


class _Grouping:
    """Sorts classes into symmetries: those that stand in the same rows of the same tensors."""

    def __init__(self, relations: Relations, classes: Classes) -> None:
        self.relations = relations
        self.classes = classes
        self.factors = relations.kind in (Kind.SCALE, Kind.SIGN)
        random = np.random.default_rng(0)
        size = classes.reason.size
        # Two independent 64-bit sums over the rows that a class stands in tell classes apart.
        self.rows = np.zeros((size, 2), dtype=np.uint64)
        self.tensors = np.zeros((size, 2), dtype=np.uint64)
        self.sides = self._sides(random)
        if not self.factors:
            for rows in relations.rows:
                for row in rows:
                    self._mark(self.rows, row, random)
        for entry in relations.entries:
            self._mark(self.tensors, entry.labels, random, tensor=True)

    def _sides(self, random: Any) -> Signatures:
        """Per label, which part it plays in what joins it to others.

        A coordinate that stands several times in one tensor, as a gate and as what it multiplies,
        is found there by these parts and not by the order in which it stands there. A label's part
        depends on those of the labels it is joined to, so parts are told apart in rounds.
        """
        parts = np.ones(self.relations.count, dtype=np.uint64)
        if self.factors:
            return parts
        couplings = [(a, b) for a, b, _ in self.relations.couplings]
        keys = random.integers(1, 2**63, size=(len(couplings), 2), dtype=np.uint64)
        known, found = 0, 1
        while found > known:
            told = parts.copy()
            for (a, b), (first, second) in zip(couplings, keys, strict=True):
                np.add.at(told, a, _scrambled(parts[b] + first))
                np.add.at(told, b, _scrambled(parts[a] + second))
            parts = _scrambled(told)
            known, found = found, np.unique(parts).size
        return parts

    def _mark(self, table: Signatures, labels: Labels, random: Any, tensor: bool = False) -> None:
        keys = random.integers(1, 2**63, size=(2, 2), dtype=np.uint64)
        of = self.classes.of[labels]
        directed = self.factors and tensor
        side = self.classes.inverse[labels].astype(np.int64) if directed else np.zeros_like(of)
        with np.errstate(over="ignore"):
            marks = keys[side] * self.sides[labels][:, None] if tensor else keys[side]
            np.add.at(table, of, marks)

    def symmetries(self) -> list[Symmetry]:
        """Blocks of interchangeable classes, joined where they stand in the same tensors."""
        used = self._used()
        free = used[self.classes.reason[used] < 0]
        key = np.concatenate([self.rows, self.tensors], 1)[free]
        blocks = [free[group] for group in _groups(key)]
        if not self.factors:
            blocks = [block for block in blocks if block.size > 1]
        sites: dict[tuple[Any, ...], list[Labels]] = {}
        for block in blocks:
            site = (block.size, *self.tensors[block[0]].tolist())
            sites.setdefault(site, []).append(block)
        found = [self._symmetry(members) for members in sites.values()]
        return [symmetry for symmetry in found if symmetry is not None]

    def _used(self) -> Labels:
        labels = [entry.labels for entry in self.relations.entries]
        every = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
        of = self.classes.of[every[every != FIXED]]
        _, first = np.unique(of, return_index=True)
        return of[np.sort(first)]  # in the order in which the graph meets them

    def _symmetry(self, blocks: list[Labels]) -> Symmetry | None:
        members = np.concatenate(blocks)
        place = np.full(self.classes.reason.size, -1, dtype=np.int64)
        place[members] = np.arange(members.size)
        edits = [
            edit
            for entry in self.relations.entries
            if (edit := self._edit(entry, place, len(blocks))) is not None
        ]
        weights = [edit for edit in edits if edit.role == "weight"]
        if not weights or (len(edits) == 1 and not self._invariant(weights[0])):
            return None
        turned = weights[0].inverse
        edits = [_oriented(edit, turned) for edit in edits]
        kind, unit = self.relations.kind, self.relations.unit
        tags = self._tags(members[:1])
        return Symmetry(kind, unit, len(blocks), blocks[0].size, tuple(edits), tags)

    def _invariant(self, edit: Edit) -> bool:
        """A lone edit is a symmetry too where the order of what it touches never matters."""
        del edit
        return self.relations.kind in (Kind.SCALE, Kind.CENTRE)

    def _edit(self, entry: Entry, place: Labels, blocks: int) -> Edit | None:
        index = place[self.classes.of[entry.labels]]
        inside = np.nonzero((index >= 0) & (entry.labels != FIXED))[0]
        if not inside.size:
            return None
        order = inside[np.lexsort((self.sides[entry.labels[inside]], index[inside]))]
        size = (index.max() + 1) // blocks if index.size else 0
        positions = order.reshape(blocks, int(size), -1)
        side = bool(self.classes.inverse[entry.labels[order[0]]])
        return Edit(
            entry.role, entry.name, entry.axes, positions, side, entry.offset, entry.operand
        )

    def _tags(self, members: Labels) -> frozenset[str]:
        wanted = set(members.tolist())
        return frozenset(
            word
            for labels, word in self.relations.tags
            if wanted & set(self.classes.of[labels].tolist())
        )

    def refusals(self) -> tuple[list[Refusal], dict[str, str]]:
        """One refusal per group of fixed classes that several weights share; reasons by weight."""
        used = self._used()
        stuck = used[self.classes.reason[used] >= 0]
        refusals: dict[tuple[str, str], Refusal] = {}
        reasons: dict[str, str] = {}
        for group in _groups(self.tensors[stuck]):
            members = stuck[group]
            names = self._names(members)
            reason: Reason = self.classes.reasons[int(self.classes.reason[members[0]])]
            for name in names:
                reasons.setdefault(name, str(reason))
            if len(names) < 2:
                continue
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            site = ", ".join(names[:3]) + more
            refusals[site, reason.text] = Refusal(site, str(reason))
        return list(refusals.values()), reasons

    def _names(self, members: Labels) -> list[str]:
        chosen = np.zeros(self.classes.reason.size, dtype=np.bool_)
        chosen[members] = True
        return [
            entry.name
            for entry in self.relations.entries
            if entry.role == "weight" and chosen[self.classes.of[entry.labels]].any()
        ]


def _scrambled(values: Signatures) -> Signatures:
    """Odd 64-bit numbers that tell values apart also after they are summed (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


def _oriented(edit: Edit, turned: bool) -> Edit:
    """Count directions from the tensor that writes the axis."""
    if not turned:
        return edit
    return Edit(
        edit.role,
        edit.name,
        edit.axes,
        edit.positions,
        not edit.inverse,
        edit.offset,
        edit.operand,
    )


def _groups(keys: Signatures) -> list[Labels]:
    """Indices of equal rows, in the order of their first member."""
    if not keys.shape[0]:
        return []
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    bounds = np.searchsorted(inverse.reshape(-1)[order], np.arange(first.size + 1))
    groups = [order[bounds[i] : bounds[i + 1]] for i in range(first.size)]
    return [groups[i] for i in np.argsort(first)]
