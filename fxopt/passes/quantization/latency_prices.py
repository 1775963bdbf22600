"""What choices cost in time, from whole programs that are lowered and timed.

    price[g, c] = T_0 / groups + (T(kind of g, c) - T_0) / groups of that kind

T_0 is the time of a call when every group takes the first choice, T(kind, c) that when the groups
of one kind (weights of the same shapes) take choice c instead. Caches, merged kernels and what the
speed gate turns down are then those of the program that will run. Kinds do not quite add up
(kernels are fused across them), so the differences of a choice are stretched to give T(all, c) when
all groups take it. Each T is timed by turns with T_0: a busy machine slows both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, has_effect
from fxopt.ir.timing import time_by_turns
from fxopt.passes.base import Context
from fxopt.passes.quantization.allocation import Assignment, Search
from fxopt.passes.quantization.assignment import Matrix
from fxopt.passes.quantization.linear_groups import LinearGroup
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.passes.quantization.sites import CHOICE

_FEWEST_ROUNDS, _ENOUGH_SECONDS = 5, 1.0
# How often another assignment is asked for when one takes longer than the budget.
_TIGHTENINGS = 3


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
        if context.lowered_call is None:
            raise RecipeError(
                "allocate-bits prices choices in milliseconds and nothing here can time a "
                "program; use fxopt.optimize, or a budget of bits."
            )
        self.program = program
        self.groups = groups
        self.choices = choices
        self.shape = shape
        self.progress = context.progress
        self.lowered_call = context.lowered_call
        self.base = self._call([0] * len(groups), "all as the first choice")
        self.fastest_base = math.inf

    def matrix(self) -> Matrix:
        """The milliseconds of each group by each choice, [groups, choices]; sums are of a call."""
        kinds = list(dict.fromkeys(group.kind for group in self.groups))
        members = np.array([[group.kind == kind for kind in kinds] for group in self.groups])
        shares = members / members.sum(0)  # of a kind's difference, for each of its groups
        found = np.zeros((len(self.groups), len(self.choices)))
        for choice in range(1, len(self.choices)):
            told = f"choice {choice + 1}/{len(self.choices)}"
            gains = [
                self._gain(members[:, k], choice, f"{told}, kind {k + 1}/{len(kinds)}")
                for k in range(len(kinds))
            ]
            whole = self._gain(np.ones(len(self.groups), bool), choice, f"{told}, everywhere")
            found[:, choice] = shares @ _stretched(np.array(gains), whole)
        return (found + 1 / len(self.groups)) * self.fastest_base

    def _gain(self, members: NDArray[np.bool_], choice: int, told: str) -> float:
        """How much longer a call takes, in T_0, when some groups take a choice."""
        return self._ratio(np.where(members, choice, 0).tolist(), told) - 1

    def held_to(self, limit: float, search: Search, chosen: Assignment) -> tuple[Assignment, str]:
        """An assignment whose measured time is within a limit, and what was predicted for it.

        Where a call takes longer than was predicted, the limit is tightened by as much.
        """
        tried = [(self._measured(chosen), chosen)]
        while tried[-1][0] > limit and len(tried) <= _TIGHTENINGS:
            measured, last = tried[-1]
            tighter = search.within(last.price * limit / measured)
            if tighter is None:
                break
            tried.append((self._measured(tighter), tighter))
        # The first that is within the limit is the last; of none, the one that is nearest to it.
        met = tried[-1][0] <= limit
        measured, best = tried[-1] if met else min(tried, key=lambda pair: pair[0])
        return best, self._compared(best.price, measured, limit)

    def _measured(self, assignment: Assignment) -> float:
        """The milliseconds of a call."""
        choices = assignment.choices.tolist()
        return self._ratio(choices, "the chosen assignment") * self.fastest_base

    def _compared(self, predicted: float, measured: float, limit: float) -> str:
        batch, length = self.shape
        over = f", {measured / limit - 1:.1%} over the budget" if measured > limit else ""
        return (
            f"one call at batch {batch}, length {length}: {predicted:.4g} ms predicted, "
            f"{measured:.4g} ms measured{over}, weights rounded to nearest"
        )

    def _ratio(self, chosen: Sequence[int], told: str) -> float:
        """The time of an assignment over T_0, each the fastest of many calls."""
        base, other = _fastest(self.base, self._call(chosen, told))
        self.fastest_base = min(self.fastest_base, base)
        return other / base

    def _call(self, chosen: Sequence[int], told: str) -> Callable[[], Any]:
        self.progress(f"timing {told}")
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
        return self.lowered_call(twin, self.shape)


def _stretched(gains: NDArray[np.float64], whole: float) -> NDArray[np.float64]:
    """Differences of kinds that add up to what all of them give together."""
    total = float(gains.sum())
    # Of unlike sign or nearly nothing, they say little about where the time goes.
    if total * whole <= 0 or not 0.25 < whole / total < 4:
        return gains + (whole - total) / len(gains)
    return gains * (whole / total)


def _fastest(*calls: Callable[[], Any]) -> list[float]:
    """The fastest of many calls of each, taken by turns, in milliseconds."""
    times = time_by_turns(calls, _FEWEST_ROUNDS, _ENOUGH_SECONDS)
    return [min(found) * 1e3 for found in times]
