"""Structured pruning: remove the neurons, heads and residual channels that matter least.

    I_c = || all weights that hold coordinate c ||   (times mean|x_c| where linears read it)
    hidden axis [.., n] -> [.., k]:   W1[kept], b1[kept], W2[:, kept]

Shapes: any hidden axis; the same number of coordinates stays in every block of it (kv group,
    expert), so that tensors stay rectangular.
Exactness: approximate; bit by bit the removed terms of each sum. Neurons whose weights are zero and
    heads whose values are zero are removed exactly. A norm over a sliced residual stream measures
    only what is left.
Source: Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023,
    arXiv:2305.11627 (coupled structures); Michel et al., NeurIPS 2019, arXiv:1905.10650 (heads).
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.slicing import removal
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.errors import AnalysisError, RecipeError
from fxopt.ir.program import Level, Program, Site
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.importance import importance_of
from fxopt.passes.equivalence.shrink import follow, shrink


@register("slice-channels")
@dataclass(frozen=True)
class SliceChannels(Pass):
    """Remove the neurons, heads and residual channels that matter least.

    Attributes:
        hidden: fraction of feed-forward neurons removed, in each expert.
        heads: fraction of query heads removed in each kv group; of all heads where each has its
            own keys.
        groups: fraction of kv heads removed, each with all its query heads.
        residual: fraction of the channels of the residual stream removed.
        importance: "magnitude", or "activation" to weigh it by the mean of what linears read.
        multiple_of: kept channels are rounded up to a multiple, so that kernels stay fast.
    """

    hidden: float = 0.0
    heads: float = 0.0
    groups: float = 0.0
    residual: float = 0.0
    importance: Literal["magnitude", "activation"] = "magnitude"
    multiple_of: int = 1

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    after = ("canonicalize",)
    before = ("quantize",)

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "groups", "residual"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} {getattr(self, name)} is not a fraction in [0, 1).")
        if self.multiple_of < 1:
            raise RecipeError(f"multiple_of {self.multiple_of} is not a positive number.")

    def needs(self) -> tuple[Calibration, ...]:
        """The mean of |x| per channel of every linear's input, for "activation"."""
        return (Calibration("mean_abs"),) if self.importance == "activation" else ()

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Whole groups first, then heads in what is left, then channels."""
        changes = Changes(program)
        changes.activations = None  # what is removed is missing in everything that follows
        means = context.statistics.get("mean_abs") if self.importance == "activation" else None
        scores: dict[str, Tensor] | None = None if means is None else dict(means)
        for unit, fractions in (
            (Unit.GROUP, {"heads": self.groups}),
            (Unit.HEAD, {"heads": self.heads}),
            (Unit.CHANNEL, {"residual": self.residual, "hidden": self.hidden}),
        ):
            if any(fractions.values()):
                self._slice(changes, unit, fractions, scores)
        return changes.result()

    def _slice(
        self,
        changes: Changes,
        unit: Unit,
        fractions: dict[str, float],
        means: dict[str, Tensor] | None,
    ) -> None:
        found = symmetries(changes.program, Kind.SLICE, unit)
        accepted: list[tuple[Symmetry, Tensor]] = []
        for symmetry in found.of_role(*(role for role, part in fractions.items() if part)):
            count = self._count(symmetry, fractions[symmetry.role])
            if count == symmetry.size:
                reason = f"rounded up to a multiple of {self.multiple_of}, all of it stays"
                changes.refuse(symmetry.path, reason)
                continue
            try:
                score = importance_of(changes.program, symmetry, means)
                kept = score.topk(count, 1).indices.sort(1).values
                follow(removal(found, [(symmetry, kept)]), changes.program, _may_norm(symmetry))
            except AnalysisError as error:
                changes.refuse(symmetry.path, str(error))
            else:
                accepted.append((symmetry, kept))
        self._apply(changes, found, accepted)
        changes.refusals += found.refusals

    def _apply(
        self, changes: Changes, found: Symmetries, accepted: list[tuple[Symmetry, Tensor]]
    ) -> None:
        if not accepted:
            return
        whole = removal(found, accepted)
        arguments = follow(whole, changes.program, norms=True)
        for name, change in shrink(changes.program, whole, arguments).items():
            changes.follow(name, change)
        for symmetry, kept in accepted:
            names = ", ".join(edit.name for edit in symmetry.weights)
            blocks = f" in each of {symmetry.blocks} blocks" if symmetry.blocks > 1 else ""
            gone = f"{symmetry.size - kept.shape[1]} of {symmetry.size} {symmetry.role}"
            changes.sites.append(
                Site(symmetry.path, f"{gone} coordinates removed{blocks}: {names}")
            )

    def _count(self, symmetry: Symmetry, fraction: float) -> int:
        width = 1 if symmetry.unit is Unit.CHANNEL else symmetry.weights[0].positions.shape[2]
        step = self.multiple_of // math.gcd(self.multiple_of, width)
        wanted = math.ceil(symmetry.size * (1 - fraction) - 1e-9)
        return min(symmetry.size, -(-wanted // step) * step)


def _may_norm(symmetry: Symmetry) -> bool:
    """Only of the residual stream is it known and said that norms measure what is left."""
    return symmetry.role == "residual"
