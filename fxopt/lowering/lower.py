"""Lower a program to a target: rules in order, each site timed, the rest run as it is."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxopt.errors import LoweringError
from fxopt.ir.legality import check_program
from fxopt.ir.program import Level, Program, Refusal, Site, has_effect
from fxopt.ir.stored_codes import code_names, is_stored_weight, stored_values, stored_weights
from fxopt.kernels import KERNELS, ensure_native
from fxopt.lowering import cpu, cuda
from fxopt.lowering.gate import SpeedGate, Timing
from fxopt.lowering.merge import merge_siblings
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import apply_rules, erase_dead
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

aten = torch.ops.aten
ops = torch.ops.fxopt
TARGETS = ("auto", "reference", "cpu", "cuda")


@dataclass(frozen=True)
class LoweringOptions:
    """How to lower.

    Attributes:
        target: "auto" follows the weights' device; "reference" keeps plain torch.
        speed_gate: time each site and keep what came in where the kernel is slower.
        compile: "inductor" hands the lowered graph to torch.compile.
        shapes: (batch, length) pairs for the gate; found by themselves when empty.
        decisions: earlier decisions of the gate, which are then obeyed.
    """

    target: str = "auto"
    speed_gate: bool = True
    compile: str | None = None
    shapes: Sequence[tuple[int, int]] = ()
    decisions: Mapping[str, bool] | None = None


@dataclass
class Lowered:
    """A lowered program, and what became of each site."""

    program: Program
    target: str
    sites: list[Site] = field(default_factory=list[Site])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])
    decisions: dict[str, bool] = field(default_factory=dict[str, bool])
    timed_sites: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    kept_floating: set[str] = field(default_factory=set[str])
    native: str = ""

    def oracle(self, program: Program) -> Program:
        """What the lowered program must compute: `program`, less the rounding the gate dropped."""
        if not self.kept_floating:
            return program
        plain = program.clone()
        apply_rules(plain, [KeepFloating(self.kept_floating)], "lower")
        plain.remove_unused_weights()
        plain.graph_module.recompile()
        return plain


def resolve_target(program: Program, target: str) -> str:
    """The target that "auto" stands for.

    Raises:
        LoweringError: there is no such target, or no such device here.
    """
    if target not in TARGETS:
        raise LoweringError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}.")
    device = next(iter(program.weights().values())).device.type if program.weights() else "cpu"
    if target == "auto":
        return device if device in ("cpu", "cuda") else "reference"
    if target in ("cpu", "cuda") and target != device:
        raise LoweringError(
            f"target {target!r} was asked for and the weights are on {device!r}. Move the model "
            f"with .to({target!r}) first, or use target='auto'."
        )
    return target


def lower(program: Program, options: LoweringOptions) -> Lowered:
    """Lower a copy of the program; the one given keeps its graph.

    Where linears are merged, the weights of `program` become views of the merged ones.

    Raises:
        LoweringError: the target does not exist or is not here.
    """
    target = resolve_target(program, options.target)
    lowered = Lowered(program.clone(), target)
    if target == "reference":
        return lowered
    gate = SpeedGate(
        shapes=options.shapes or default_shapes(program),
        decisions=dict(options.decisions or {}),
        enabled=options.speed_gate,
        frozen=options.decisions is not None,
    )
    if target == "cpu":
        status = ensure_native()
        lowered.native = str(status)
    _apply_table(lowered, program, gate, target)
    _drop_leftover_quantization(lowered)
    _finish(lowered.program)
    lowered.timings, lowered.decisions = gate.timings, gate.decisions
    lowered.timed_sites = gate.sites
    return lowered


def default_shapes(program: Program) -> list[tuple[int, int]]:
    """Decode and prefill for a program with a cache, one row and several for the others."""
    return [(1, 1), (1, 128)] if program.signature.cache else [(1, 128), (8, 64)]


def _apply_table(lowered: Lowered, original: Program, gate: SpeedGate, target: str) -> None:
    if target == "cuda":
        for rules in (cuda.INTEGER, (*cuda.PROLOGUES, *cuda.EPILOGUES)):
            _apply(lowered, gate, rules)
        return
    # Norms come before linears are merged, gates after: a merged gate and up is one product.
    _apply(lowered, gate, (*cpu.INTEGER, *cpu.ELEMENTWISE))
    _apply(lowered, gate, (*cpu.PROLOGUES, *cpu.EPILOGUES))
    lowered.sites += merge_siblings(lowered.program, original)
    _apply(lowered, gate, cpu.BLOCKS)
    # Last: a merged linear reads its norm alone, and one in a block does not read its codes.
    _apply(lowered, gate, cpu.PRODUCERS)


def _apply(lowered: Lowered, gate: SpeedGate, rules: Sequence[LoweringRule]) -> None:
    timed = [_Timed(rule, gate) for rule in rules]
    sites, refusals = apply_rules(lowered.program, timed, "lower")
    lowered.sites += sites
    lowered.refusals += refusals


class _Timed(LoweringRule):
    """A rule that is used only where the gate lets it."""

    def __init__(self, rule: LoweringRule, gate: SpeedGate) -> None:
        self.rule = rule
        self.gate = gate
        self.benefit = rule.benefit  # type: ignore[misc]

    @property
    def name(self) -> str:
        return self.rule.name

    def patterns(self) -> list[Any]:
        return self.rule.patterns()

    def condition(self, program: Program, match: Match) -> bool:
        return self.rule.condition(program, match)

    def kept(self, match: Match) -> tuple[Node, ...]:
        return self.rule.kept(match)

    def routings(self, match: Match) -> Mapping[Node, int]:
        return self.rule.routings(match)

    def check(self, program: Program, match: Match) -> str | None:
        return self.rule.check(program, match) or self.gate.refuse(program, self.rule, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return self.rule.rewrite(build, match)


class KeepFloating(LoweringRule):
    """A linear without an integer kernel runs in floating point, on the stored integers' values."""

    def __init__(self, only: AbstractSet[str] | None = None) -> None:
        self.only = only

    def pattern(
        self, op: PatternOperators, x: Variable, scale: Variable, zero: Variable, block: Variable
    ) -> Any:
        q = op.call(ops.quantize, x, scale, zero, block, ...)
        back = op.call(ops.dequantize, q, scale, zero, block, ...)
        return op.linear(back, op.variable("weight", is_stored_weight), op.variable("bias"))

    def check(self, program: Program, match: Match) -> str | None:
        if self.only is not None and match.root.name not in self.only:
            return "it has a kernel"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.linear.default, match.x, match.weight, match.bias)


def _drop_leftover_quantization(lowered: Lowered) -> None:
    program = lowered.program
    sites, _ = apply_rules(program, [KeepFloating()], "lower")
    lowered.sites += sites
    lowered.kept_floating = {site.node for site in sites}
    for node in list(stored_weights(program)):
        build = Builder(program, node, "lower")
        name = f"{next(code_names(node))}_floating"
        read = build.weight(name, stored_values(program, node))
        node.replace_all_uses_with(read)
        erase_dead([node])


def _finish(program: Program) -> None:
    program.graph.eliminate_dead_code(has_effect)
    program.remove_unused_weights()
    program.level = Level.LOWERED
    check_program(program, shapes=False)
    program.graph_module.recompile()


def kernel_names() -> list[str]:
    """Every operator that a lowering may write."""
    return sorted(KERNELS)
