"""Sort classes of labels into symmetries, in one walk over the tensors that hold them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.analysis.axis import Edit, Symmetry
from fxopt.analysis.classes import Classes
from fxopt.analysis.copies import ranks_of_copies
from fxopt.analysis.relations import FIXED, Entry, Kind, Labels, Reason, Relations
from fxopt.ir.program import Refusal

Signatures = npt.NDArray[np.uint64]
Axis = tuple[str, tuple[int, ...]]  # a weight and its axes
Reasons = dict[Axis, str]


class Grouping:
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
        self.copies = ranks_of_copies(relations)
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
        members = list(sites.values())
        edits, tags = self._edits(members), self._tags()
        found = [
            self._symmetry(site, held, int(tags[site[0][0]]))
            for site, held in zip(members, edits, strict=True)
        ]
        return [symmetry for symmetry in found if symmetry is not None]

    def _used(self) -> Labels:
        labels = [entry.labels for entry in self.relations.entries]
        every = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
        of = self.classes.of[every[every != FIXED]]
        _, first = np.unique(of, return_index=True)
        return of[np.sort(first)]  # in the order in which the graph meets them

    def _edits(self, sites: list[list[Labels]]) -> list[list[Edit]]:
        """The edits of each site, found in one walk over all tensors."""
        site_of, place = (np.full(self.classes.reason.size, -1, dtype=np.int64) for _ in range(2))
        for number, blocks in enumerate(sites):
            members = np.concatenate(blocks)
            site_of[members] = number
            place[members] = np.arange(members.size)
        edits: list[list[Edit]] = [[] for _ in sites]
        for entry in self.relations.entries:
            of = self.classes.of[entry.labels]
            held = np.where(entry.labels == FIXED, -1, site_of[of])
            for number in np.unique(held[held >= 0]).tolist():
                shape = (len(sites[number]), sites[number][0].size)
                for inside in self._by_side(entry, np.nonzero(held == number)[0]):
                    edits[number].append(self._edit(entry, inside, place[of[inside]], shape))
        return edits

    def _by_side(self, entry: Entry, inside: Labels) -> list[Labels]:
        """Places in a tensor, those that are multiplied apart from those that are divided.

        Queries and keys of one fused weight are both.
        """
        if not self.factors:
            return [inside]
        divided = self.classes.inverse[entry.labels[inside]].astype(bool)
        return [part for part in (inside[~divided], inside[divided]) if part.size]

    def _edit(self, entry: Entry, inside: Labels, place: Labels, shape: tuple[int, int]) -> Edit:
        labels = entry.labels[inside]
        order = inside[np.lexsort((self.copies[labels], self.sides[labels], place))]
        side = bool(self.classes.inverse[entry.labels[order[0]]])
        positions = order.reshape(*shape, -1)
        return Edit(
            entry.role, entry.name, entry.axes, positions, side, entry.offset, entry.operand
        )

    def _symmetry(self, blocks: list[Labels], edits: list[Edit], tags: int) -> Symmetry | None:
        weights = [edit for edit in edits if edit.role == "weight"]
        # The order or basis of an axis that stands once, in one tensor, means nothing to others.
        once = len(edits) == 1 and edits[0].positions.shape[2] == 1
        alone = once and self.relations.kind not in (Kind.SCALE, Kind.CENTRE)
        if not weights or alone:
            return None
        if weights[0].inverse:  # directions are counted from the tensor that writes the axis
            edits = [edit.turned() for edit in edits]
        words = frozenset(word for bit, word in enumerate(self._words()) if tags >> bit & 1)
        kind, unit = self.relations.kind, self.relations.unit
        return Symmetry(kind, unit, len(blocks), blocks[0].size, tuple(edits), words)

    def _words(self) -> list[str]:
        return sorted({word for _, word in self.relations.tags})

    def _tags(self) -> Labels:
        """The tags of each class, a bit for each word."""
        bits = {word: np.int64(1 << bit) for bit, word in enumerate(self._words())}
        tags = np.zeros(self.classes.reason.size, dtype=np.int64)
        for labels, word in self.relations.tags:
            tags[self.classes.of[labels]] |= bits[word]
        return tags

    def refusals(self) -> tuple[list[Refusal], Reasons]:
        """One refusal per group of fixed classes that several weights share; reasons by axis."""
        used = self._used()
        stuck = used[self.classes.reason[used] >= 0]
        groups = _groups(self.tensors[stuck])
        members = [stuck[group] for group in groups]
        refusals: dict[tuple[str, str], Refusal] = {}
        reasons: Reasons = {}
        for classes, held in zip(members, self._axes(members), strict=True):
            reason: Reason = self.classes.reasons[int(self.classes.reason[classes[0]])]
            for axis in held:
                reasons.setdefault(axis, str(reason))
            names = [name for name, _ in held]
            if len(names) < 2:
                continue
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            site = ", ".join(names[:3]) + more
            refusals[site, reason.text] = Refusal(site, str(reason))
        return list(refusals.values()), reasons

    def _axes(self, groups: list[Labels]) -> list[list[Axis]]:
        """The axes of weights along which each group of classes stands."""
        group_of = np.full(self.classes.reason.size, -1, dtype=np.int64)
        for number, members in enumerate(groups):
            group_of[members] = number
        axes: list[list[Axis]] = [[] for _ in groups]
        for entry in self.relations.entries:
            if entry.role == "weight":
                held = group_of[self.classes.of[entry.labels]]
                for number in np.unique(held[held >= 0]).tolist():
                    axes[number].append((entry.name, entry.axes))
        return axes


def _scrambled(values: Signatures) -> Signatures:
    """Odd 64-bit numbers that tell values apart also after they are summed (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


def _groups(keys: Signatures) -> list[Labels]:
    """Indices of equal rows, in the order of their first member."""
    if not keys.shape[0]:
        return []
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    bounds = np.searchsorted(inverse.reshape(-1)[order], np.arange(first.size + 1))
    groups = [order[bounds[i] : bounds[i + 1]] for i in range(first.size)]
    return [groups[i] for i in np.argsort(first)]
