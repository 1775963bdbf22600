"""Bit allocation: linears that rounding harms little get few bits, within a budget.

    minimize sum_g loss[g, c_g]   subject to   sum_g price[g, c_g] <= budget

    output      loss[g, c] = distance of the output when g alone is stored by choice c
    trace       loss[g, c] = sum over linears of tr(H) / (2 n) || Q_c(W) - W ||^2
    eigenvalue  loss[g, c] = sum over linears of lambda_max(H) / 2 || Q_c(W) - W ||^2

Shapes: a group g is the linears that read one activation; W [out, in] with n elements; H the
    Hessian of the distance in W. Distance: KL in nats per token for logits, else the relative
    squared error of hidden states. Prices are bytes, or milliseconds of a call.
Exactness: equivalent; it marks linears, and `quantize` or `gptq` after it stores them so. Losses
    are those of rounding to nearest, and are taken to add up; what was chosen is measured. Under
    an accuracy budget the limit on the price is bisected until the measured error just meets it;
    under a time, the limit is tightened where a call takes longer than was predicted.
    `trace` and `eigenvalue` do not see rounded activations; `eigenvalue` takes some products with
    H for each linear by itself, which is slow beyond small models.
Source: Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, NeurIPS
    2020, arXiv:1911.03852 (trace); Shen et al., Q-BERT: Hessian Based Ultra Low Precision
    Quantization of BERT, AAAI 2020, arXiv:1909.05840 (|mean| + deviation of eigenvalues over
    batches); Yao et al., HAWQ-V3, ICML 2021, arXiv:2011.10680 (integer program).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from fxopt.errors import QualityFloorError, RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, Table, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.allocation import Assignment, Search
from fxopt.passes.quantization.budget import Budget
from fxopt.passes.quantization.latency_prices import LatencyPrices
from fxopt.passes.quantization.linear_groups import LinearGroup, byte_prices, linear_groups
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.rounding_trials import Sensitivity, Trials
from fxopt.passes.quantization.sites import CHOICE, not_selected
from fxopt.passes.quantization.weights import kind_of


@register("allocate-bits")
@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose for each linear how it is stored, so that the whole stays within a budget."""

    budget: Budget
    choices: tuple[Choice, ...] = (
        Choice(WeightOptions("int4", "group", 64)),
        Choice(WeightOptions("int8")),
    )
    sensitivity: Sensitivity = "output"
    batches: int = 1
    probes: int = 16
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize",)
    before = ("quantize", "gptq")
    followed_by = ("quantize", "gptq")

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2:
            raise RecipeError("there is nothing to allocate: give at least two different choices.")
        if self.batches < 1 or self.probes < 1:
            raise RecipeError(
                f"batches {self.batches} and probes {self.probes} must be positive numbers."
            )

    def needs(self) -> tuple[Calibration, ...]:
        """The calibration data itself: errors are those of outputs."""
        return (Calibration("samples"),)

    def run(self, program: Program, context: Context) -> PassResult:
        """Price and judge every choice for every group, solve, and mark the linears."""
        groups, refusals = linear_groups(program, self.choices, self.include, self.exclude)
        refusals += self._leave_experts(program)
        if not groups:
            return PassResult(refusals=tuple(refusals), activations={})
        timed = None
        if self.budget.resource == "milliseconds":
            timed = LatencyPrices(program, groups, self.choices, self.budget.shape, context)
        price = byte_prices(program, groups, self.choices) if timed is None else timed.matrix()
        trials = Trials(program, context.samples[: self.batches], groups, self.choices)
        loss = trials.losses(self.sensitivity, self.probes, context.progress)
        search = Search(loss, price, trials, self.budget, context.progress)
        chosen = search.best(self._limit(groups))
        if chosen is None:
            raise self._out_of_reach(search)
        notes = [f"errors are those of {trials.error.tokens:,} real tokens"]
        if timed is not None:
            limit = math.inf if self.budget.judged_by_output else self.budget.limit
            chosen, compared = timed.held_to(limit, search, chosen)
            notes.insert(0, compared)
        sites = [
            self._mark(node, group, int(choice), float(row[choice]))
            for group, row, choice in zip(groups, loss, chosen.choices, strict=True)
            for node in group.linears
        ]
        tables = (self._frontier(search, chosen),)
        found = (tuple(sites), tuple(refusals), tuple(notes))
        return PassResult(*found, tables=tables, activations={})

    def _leave_experts(self, program: Program) -> list[Refusal]:
        """Mixtures stay in floating point, as the budget does not count what rounding them does."""
        left: list[Refusal] = []
        for node in program.nodes():
            if kind_of(node) != "experts":
                continue
            reason = not_selected(node, self.include, self.exclude)
            if reason is None:
                node.meta[CHOICE] = Choice()
                reason = (
                    "a mixture of experts is not part of the budget and stays in floating point; "
                    "exclude it here, and the pass behind stores it as it says"
                )
            left.append(Refusal(module_path(node) or node.name, reason))
        return left

    def _limit(self, groups: Sequence[LinearGroup]) -> float:
        if self.budget.kind == "bits":
            return self.budget.limit * sum(group.elements for group in groups) / 8
        return self.budget.limit

    def _mark(self, node: Node, group: LinearGroup, choice: int, loss: float) -> Site:
        node.meta[CHOICE] = self.choices[choice]
        shared = f", shared by {len(group.linears)} linears" if len(group.linears) > 1 else ""
        detail = f"{self.choices[choice].describe()}: loss {loss:.3g}{shared}"
        return Site(module_path(node), detail, node.name)

    def _out_of_reach(self, search: Search) -> Exception:
        if self.budget.judged_by_output:
            best = max(search.tried, key=lambda tried: tried.price)
            return QualityFloorError(
                f"allocate-bits: budget {self.budget.kind} {self.budget.limit:g} is not met by any "
                f"of the choices; the dearest give {best.figure:.4g}. Add a choice with more bits, "
                "or {} to leave a linear in floating point."
            )
        least = search.cheapest()
        return RecipeError(
            f"allocate-bits: even the cheapest choices take {least:,.4g} {self.budget.resource}, "
            f"and the budget allows {search.limit:,.4g}. Raise it or add a cheaper choice."
        )

    def _frontier(self, search: Search, chosen: Assignment) -> Table:
        unit = self.budget.resource
        figure = f"{self.budget.kind}, measured" if self.budget.judged_by_output else "SQNR dB"
        rows = [
            (
                float(f"{tried.price:.6g}"),
                float(f"{tried.predicted:.4g}"),
                float(f"{tried.measured:.4g}"),
                float(f"{tried.figure:.4g}"),
                search.counts(tried),
                "chosen" if tried is chosen else "",
            )
            for tried in sorted(search.tried, key=lambda tried: tried.price)
        ]
        columns = (unit, "predicted loss", "measured loss", figure, "groups by choice", "")
        return Table("frontier", columns, tuple(rows), x=unit, y="measured loss")
