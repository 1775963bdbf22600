"""Mixed precision of activations: the few that rounding harms most stay in floating point.

    e(S) = || y(S) - y(all) || / || y(all) ||,    gain(a) = e({}) - e({a})

Shapes: S is the set of activations in floating point, y(S) [tokens, d] the first output over real
    tokens of the calibration data. All linears that read an activation keep it together.
Exactness: approximate, with no larger step anywhere than before. Activations are ranked once, by
    leave-one-out, and taken in that order until there are `keep` of them or e is at `target`.
    Deviation: kept activations are in the model's own dtype, not in 16 bit fixed point; weights
    stay rounded, and y(all) is with them. The default of `keep` was chosen on MiniLM's held-out
    text, where 8 left half of the error and 10 less; other models need a number of their own.
Source: Bondarenko et al., Understanding and Overcoming the Challenges of Efficient Transformer
    Quantization, EMNLP 2021, arXiv:2109.12948.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.lockstep import Instead, Lockstep
from fxopt.analysis.output_error import OutputError
from fxopt.analysis.samples import Sample
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.rewrite.builder import first_call

aten = torch.ops.aten
ops = torch.ops.fxopt
_NOTHING = Refusal("", "no linear reads an activation with a static scale; run quantize with one")


@register("mixed-precision")
@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Give back their precision to the static activations that cost the output most."""

    keep: int = 10
    target: float | None = None
    batches: int = 2

    exactness = Exactness.APPROXIMATE
    input_level = Level.QUANTIZED
    after = ("quantize",)
    may_do_nothing = True

    def __post_init__(self) -> None:
        target = 0.0 if self.target is None else self.target
        if self.keep < 0 or not 0 <= target < math.inf or self.batches < 1:
            raise RecipeError(
                f"keep {self.keep} and target {self.target} must be finite and not negative, "
                f"batches {self.batches} must be positive."
            )

    def needs(self) -> tuple[Calibration, ...]:
        """The calibration data itself: errors are those of outputs."""
        return (Calibration("samples"),)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rank the rounded activations by what each costs, and restore the first ones."""
        rounded = static_activations(program)
        if not rounded:
            return PassResult(refusals=(_NOTHING,), activations={})
        trial = _Trial(program, context.samples[: self.batches])
        whole = trial.error(())
        left = self.keep - sum(len(r.sites) for r in program.history if r.name == self.name)
        if left <= 0 or (self.target is not None and whole <= self.target):
            return PassResult(activations={})
        alone = trial.errors_alone(context.progress)
        gains = {name: whole - alone[name] for name in rounded}
        sites: list[Site] = []
        kept: list[str] = []
        # A stable sort: equals stay in graph order.
        for name in sorted(gains, key=lambda name: -gains[name])[:left]:
            kept.append(name)
            error = trial.error(kept)
            detail = f"gain {gains[name]:.3g} alone, error {error:.4g} with those before it"
            sites.append(_keep(rounded[name], f"{detail}, {whole:.3g} without any"))
            if self.target is not None and error <= self.target:
                break
        notes = (f"errors are those of {trial.exact.tokens:,} real tokens",)
        return PassResult(tuple(sites), notes=notes, activations={})


def static_activations(program: Program) -> dict[str, list[Node]]:
    """The linears that read each statically rounded activation, by its name, in graph order."""
    found: dict[str, list[Node]] = {}
    for linear in program.nodes(aten.linear.default):
        source = _source(linear)
        if source is not None:
            found.setdefault(source.name, []).append(linear)
    return found


def _source(linear: Node) -> Node | None:
    """What a linear reads through quantize and dequantize with a stored scale, or None."""
    back: Any = linear.args[0]
    if back.target is not ops.dequantize.default:
        return None
    codes: Any = back.args[0]
    static = codes.target is ops.quantize.default and codes.args[1].op == "get_attr"
    return codes.args[0] if static else None


def _restore(linears: Iterable[Node]) -> None:
    for linear in linears:
        source = _source(linear)
        assert source is not None  # noqa: S101 - static_activations found it
        linear.update_arg(0, source)


def _keep(linears: list[Node], detail: str) -> Site:
    paths = ", ".join(dict.fromkeys(module_path(linear) for linear in linears))
    _restore(linears)
    return Site(paths, f"input in floating point: {detail}", linears[0].name)


class _Trial:
    """The error of the first output with some activations in floating point."""

    def __init__(self, program: Program, samples: Sequence[Sample]) -> None:
        self.program = program.clone()  # untouched by what the pass restores
        self.samples = samples
        self.rounded = static_activations(self.program)
        self.whole = Lockstep(self.program, samples)
        self.whole.begin()
        self.exact = OutputError.of(self.program, samples, self._outputs(self.rounded))

    def error(self, kept: Iterable[str]) -> float:
        """e(S) of the activations `kept`."""
        return self.exact.relative(self._outputs(kept))

    def errors_alone(self, progress: Callable[[str], None]) -> dict[str, float]:
        """e({a}) of each activation; what comes before it is computed once for all."""
        found: dict[str, float] = {}
        first = {_first_codes(linears): name for name, linears in self.rounded.items()}
        lockstep = Lockstep(self.program, self.samples)

        def visit(node: Node) -> None:
            name = first.get(node)
            if name is not None:
                progress(name)
                outputs = list(lockstep.outputs(node, self._instead([name])))
                found[name] = self.exact.relative(outputs)

        lockstep.run(visit)
        return found

    def _outputs(self, kept: Iterable[str]) -> list[list[Tensor]]:
        return list(self.whole.outputs(first_call(self.program), self._instead(kept)))

    def _instead(self, kept: Iterable[str]) -> dict[Node, Instead]:
        """Codes that are the activation itself, and are read as they are."""
        instead: dict[Node, Instead] = {}
        for linear in (linear for name in kept for linear in self.rounded[name]):
            back: Any = linear.args[0]
            codes = back.args[0]
            instead[codes] = lambda load, source=codes.args[0]: load(source)
            instead[back] = lambda load, codes=codes: load(codes)
        return instead


def _first_codes(linears: Sequence[Node]) -> Node:
    """Of the nodes that round what linears read, the one that is computed first."""
    reads: list[Any] = [linear.args[0] for linear in linears]
    return min(back.args[0] for back in reads)
