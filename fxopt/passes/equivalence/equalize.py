"""Cross-layer equalization: give both sides of a hidden axis the same reach, channel by channel.

    s_i = sqrt(r1_i / r2_i),   W1 <- diag(1/s) W1,   W2 <- W2 diag(s),   r = max|W| per channel

Shapes: W1 [d, m], rows; W2 [n, d], columns; s [d]. Vectors (gains, biases) follow; they count only
    where no matrix stands on their side.
Exactness: equal over the reals.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, arXiv:1906.04721.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Edit, Symmetry, symmetries
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, Site
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes

_ONE_SIDE = (
    "no other weight takes its factors up inversely, so there is no second range to make equal to "
    "its own"
)


@register("equalize")
@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize the ranges of weights across every hidden axis whose channels can be scaled."""

    iterations: int = 10
    tolerance: float = 1e-3

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate")
    before = ("quantize",)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.tolerance <= 0:
            raise RecipeError("equalize needs at least one iteration and a positive tolerance.")

    def run(self, program: Program, context: Context) -> PassResult:
        """Go over all sites until no channel moves by more than the tolerance."""
        found = symmetries(program, Kind.SCALE)
        changes = Changes(program)
        for symmetry in found:
            if len({edit.inverse for edit in symmetry.weights}) < 2:
                changes.refuse(_names(symmetry), _ONE_SIDE)
        sites: dict[int, Site] = {}  # an axis that changes in several iterations is one site
        for iteration in range(self.iterations):
            moved = 0.0
            for index, symmetry in enumerate(found):
                factor = _factors(program, symmetry)
                change = float(factor.log().abs().max())
                if change > self.tolerance:
                    changes.apply(symmetry, factor, "ranges equalized")
                    sites.setdefault(index, changes.sites[-1])
                moved = max(moved, change)
            context.progress(f"iteration {iteration + 1}: largest change {moved:.2g}")
            if moved <= self.tolerance:
                break
        changes.sites = list(sites.values())
        return changes.result(found.refusals)


def _names(symmetry: Symmetry) -> str:
    names = [edit.name for edit in symmetry.weights]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _factors(program: Program, symmetry: Symmetry) -> Tensor:
    """What multiplies the writing side, [blocks, size]."""
    written = _reach(program, [edit for edit in symmetry.weights if not edit.inverse])
    read = _reach(program, [edit for edit in symmetry.weights if edit.inverse])
    if written is None or read is None:
        return torch.ones(symmetry.blocks, symmetry.size, dtype=torch.float64)
    alive = (written > 0) & (read > 0)
    return torch.where(alive, torch.sqrt(read / written.clamp(1e-300)), 1.0)


def _reach(program: Program, edits: Sequence[Edit]) -> Tensor | None:
    """max|W| per coordinate over the matrices among the edits, over all where there is none."""
    matrices = [edit for edit in edits if program.weight(edit.name).dim() > len(edit.axes)]
    reaches = [_reach_of(program.weight(edit.name), edit) for edit in matrices or edits]
    return torch.stack(reaches).amax(0) if reaches else None


def _reach_of(value: Tensor, edit: Edit) -> Tensor:
    rows = value.double().movedim(edit.axes, list(range(len(edit.axes))))
    rows = (rows.flatten(0, len(edit.axes) - 1) + edit.offset).abs()
    reach = rows.flatten(1).amax(1) if rows.dim() > 1 else rows
    return reach[torch.from_numpy(edit.positions)].amax(2)
