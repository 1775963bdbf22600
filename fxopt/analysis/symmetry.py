"""Find every hidden axis whose basis may be changed without changing the function.

A symmetry is a set of edits: tensors, and where along their axes the coordinates of one hidden
axis stand. `symmetries(program, kind)` derives them from the op rules by dataflow alone.
"""

from dataclasses import dataclass, field
from typing import Any

from fxopt.analysis.axis import Edit, Symmetry
from fxopt.analysis.classes import Classes, solve
from fxopt.analysis.grouping import Axis, Grouping, Reasons
from fxopt.analysis.relations import Kind, Relations, Unit
from fxopt.analysis.walk import relate
from fxopt.ir.program import Program, Refusal

__all__ = ["Edit", "Symmetries", "Symmetry", "relate", "symmetries"]


@dataclass
class Symmetries:
    """All symmetries of one kind, and the axes that have none, with the reason."""

    kind: Kind
    unit: Unit
    found: list[Symmetry] = field(default_factory=list[Symmetry])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    reasons: Reasons = field(default_factory=dict[Axis, str])  # of axes that are fixed
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

    def reason(self, weight: str, axis: int | None = None) -> str | None:
        """Why a weight, or one axis of it, may not change; None where nothing stands in the way."""
        for (name, axes), reason in self.reasons.items():
            if name == weight and (axis is None or axis in axes):
                return reason
        return None

    def refused_axes(self) -> list[Refusal]:
        """Why each single axis may not change, for who found nothing at all."""
        return [
            Refusal(f"{name}, axis {', '.join(map(str, axes))}", reason)
            for (name, axes), reason in self.reasons.items()
        ]

    def reason_of_value(self, node: Any) -> str | None:
        """Why what a node computes may not change; None where nothing stands in the way."""
        assert self.relations is not None  # noqa: S101 - symmetries() always keeps them
        assert self.classes is not None  # noqa: S101
        labels = self.relations.labels(node)
        stuck = labels[~self.classes.free(labels)]
        return str(self.classes.why(int(stuck[0]))) if stuck.size else None

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
    grouping = Grouping(relations, classes)
    result = Symmetries(kind, unit, relations=relations, classes=classes)
    result.found = grouping.symmetries()
    result.refusals, result.reasons = grouping.refusals()
    return result
