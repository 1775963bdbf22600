"""Bring every captured graph to one form, so that no later pass needs two.

    x * rsqrt(mean(x^2) + eps) * w   ->   aten.rms_norm
    x * cos + rotate_half(x) * sin   ->   fxopt::rope
    softmax(q k^T) v                 ->   fxopt::attention
    addmm(b, x, W)                   ->   aten.linear

Shapes: inputs and outputs keep theirs; intermediate strides may change.
Exactness: equal over the reals.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from fxopt.errors import PassError
from fxopt.ir.program import Level, Program, Refusal, Site
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.canonicalize import (
    activation,
    attention,
    cleanup,
    constants,
    einsum,
    grouped_query,
    layer_norm,
    linear,
    rms_norm,
    rope,
    scatter,
    sdpa,
    select,
    views,
)
from fxopt.passes.canonicalize.functional import make_functional
from fxopt.passes.canonicalize.results import separate_results, shared_results
from fxopt.passes.canonicalize.subexpressions import merge_equal
from fxopt.rewrite.driver import apply_rules

aten = torch.ops.aten
fxopt = torch.ops.fxopt

# What the pass raises, by the name that sites and notes give it.
RAISED = {
    "rms_norm": aten.rms_norm.default,
    "layer_norm": aten.layer_norm.default,
    "rope": fxopt.rope.default,
    "attention": fxopt.attention.default,
    "linear": aten.linear.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
}
TIDYING = (
    *cleanup.RULES,
    *views.RULES,
    *select.RULES,
    *scatter.RULES,
    *einsum.RULES,
    *constants.RULES,
)
RAISING = (
    *linear.RULES,
    *rms_norm.RULES,
    *layer_norm.RULES,
    *rope.RULES,
    *activation.RULES,
    *sdpa.RULES,
    *attention.RULES,
    *grouped_query.RULES,
)
ROUNDS = 10  # models need three or four


@register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Raise norms, rope, attention, linear and activations from the operators export leaves."""

    exactness = Exactness.EQUIVALENT
    input_level = Level.CAPTURED
    output_level = Level.CANONICAL
    may_do_nothing = True
    for_any_weights = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite until nothing changes."""
        before, shared = len(program.graph.nodes), shared_results(program)
        _, refusals = make_functional(program, self.name)
        if refusals:  # what is written to in place may be anything but what it looks like
            return PassResult(refusals=tuple(refusals))
        log = _Log()
        for _ in range(ROUNDS):
            if not self._round(program, log):
                break
        else:
            raise PassError(f"{self.name} did not come to an end in {ROUNDS} rounds.")
        separate_results(program, shared, self.name)
        program.graph.lint()
        program.graph_module.recompile()
        sites = tuple(site for site in log.sites if site.detail in RAISED)
        notes = (describe(program), f"{before} nodes before, {len(program.graph.nodes)} after")
        return PassResult(sites, tuple(log.refusals), notes)

    def _round(self, program: Program, log: "_Log") -> bool:
        """Run every step once; whether any of them changed something."""
        log.changes = 0
        log.refusals.clear()
        log.count(constants.fold_constants(program, self.name))
        log.record(apply_rules(program, TIDYING, self.name))
        log.count(merge_equal(program))
        log.record(apply_rules(program, RAISING, self.name))
        log.count_refusing(linear.store_transposed(program))
        log.count(cleanup.remove_dead(program))
        return log.changes > 0


class _Log:
    """What the steps of a run did, and how many changes the current round made."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.changes = 0

    def count(self, changes: int) -> None:
        self.changes += changes

    def count_refusing(self, outcome: tuple[int, list[Refusal]]) -> None:
        changes, refusals = outcome
        self.changes += changes
        self.refusals += refusals

    def record(self, outcome: tuple[list[Site], list[Refusal]]) -> None:
        sites, refusals = outcome
        self.changes += len(sites)
        self.sites += sites
        self.refusals += refusals


def describe(program: Program) -> str:
    """How many operators of each raised kind a program holds: `4 rope, 2 attention`."""
    counts = Counter(node.target for node in program.nodes())
    return ", ".join(
        f"{counts[target]} {kind}" for kind, target in RAISED.items() if counts[target]
    )
