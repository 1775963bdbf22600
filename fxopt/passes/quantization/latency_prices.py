"""What choices cost in time, from whole programs that are lowered and timed.

    price[g, c] = T_0 / groups + (T(kind of g, c) - T_0) / groups of that kind

T_0 is the time of a call when every group takes the first choice, T(kind, c) that when the groups
of one kind (weights of the same shapes) take choice c instead. Caches, merged kernels and what the
speed gate turns down are then those of the program that will run.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, has_effect
from fxopt.passes.base import Context
from fxopt.passes.quantization.assignment import Matrix
from fxopt.passes.quantization.linear_groups import LinearGroup
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.passes.quantization.sites import CHOICE


class LatencyPrices:
    """Times programs in which groups are stored by their choices."""

    def __init__(
        self,
        program: Program,
        groups: Sequence[LinearGroup],
        choices: Sequence[Choice],
        shape: tuple[int, int],
        context: Context,
    ) -> None:
        if context.latency is None:
            raise RecipeError(
                "allocate-bits prices choices in milliseconds and nothing here can time a "
                "program; use fxopt.optimize, or a budget of bits."
            )
        self.program = program
        self.groups = groups
        self.choices = choices
        self.shape = shape
        self.context = context
        self.latency = context.latency

    def matrix(self) -> Matrix:
        """The milliseconds of each group by each choice, [groups, choices]; sums are of a call."""
        kinds = Counter(group.kind for group in self.groups)
        base = self._time([0] * len(self.groups), "all as the first choice")
        found = np.full((len(self.groups), len(self.choices)), base / len(self.groups))
        for number, (kind, count) in enumerate(kinds.items()):
            alike = [group.kind == kind for group in self.groups]
            for choice in range(1, len(self.choices)):
                told = f"kind {number + 1}/{len(kinds)}, choice {choice + 1}"
                taken = self._time([choice if same else 0 for same in alike], told)
                found[np.array(alike), choice] += (taken - base) / count
        return found

    def compared(self, chosen: Sequence[int], predicted: float) -> str:
        """What was predicted for an assignment, and what it takes."""
        measured = self._time(chosen, "the chosen assignment")
        batch, length = self.shape
        return (
            f"one call at batch {batch}, length {length}: {predicted:.4g} ms predicted, "
            f"{measured:.4g} ms measured, weights rounded to nearest"
        )

    def _time(self, chosen: Sequence[int], told: str) -> float:
        self.context.progress(f"timing {told}")
        twin = self.program.clone()
        nodes = {node.name: node for node in twin.nodes()}
        for group, choice in zip(self.groups, chosen, strict=True):
            for linear in group.linears:
                nodes[linear.name].meta[CHOICE] = self.choices[choice]
        # Only what is marked: other linears stay as they are.
        marked = tuple(sorted({path for g in self.groups for path in g.paths}))
        Quantize(weights=WeightOptions(), include=marked).run(twin, Context())
        twin.level = Level.QUANTIZED
        twin.graph.eliminate_dead_code(has_effect)
        twin.remove_unused_weights()
        twin.graph_module.recompile()
        return self.latency(twin, self.shape)
