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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import Sample, real_rows
from fxopt.analysis.execution import run
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, has_effect, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register

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
        if self.keep < 0 or (self.target or 0) < 0 or self.batches < 1:
            raise RecipeError(
                f"keep {self.keep} and target {self.target} must not be negative, batches "
                f"{self.batches} must be positive."
            )

    def needs(self) -> tuple[Calibration, ...]:
        """The calibration data itself: errors are those of outputs."""
        return (Calibration("samples"),)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rank the rounded activations by what each costs, and restore the first ones."""
        rounded = static_activations(program)
        if not rounded:
            return PassResult(refusals=(_NOTHING,))
        trial = _Trial(rounded, program, context.samples[: self.batches])
        whole = trial.error(())
        left = self.keep - sum(len(r.sites) for r in program.history if r.name == self.name)
        if left <= 0 or (self.target is not None and whole <= self.target):
            return PassResult()
        gains: dict[str, float] = {}
        for name in rounded:
            context.progress(name)
            gains[name] = whole - trial.error((name,))
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
        return PassResult(tuple(sites))


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

    def __init__(
        self, rounded: dict[str, list[Node]], program: Program, samples: Iterable[Sample]
    ) -> None:
        self.program = program.clone()  # untouched by what the pass restores
        self.samples = list(samples)
        self.exact = self._outputs(rounded)
        self.size = sum(float(y.square().sum()) for y in self.exact) ** 0.5

    def error(self, kept: Iterable[str]) -> float:
        """e(S) of the activations `kept`."""
        pairs = zip(self._outputs(kept), self.exact, strict=True)
        squares = sum(float((y - exact).square().sum()) for y, exact in pairs)
        return squares**0.5 / max(self.size, 1e-30)

    def _outputs(self, kept: Iterable[str]) -> list[Tensor]:
        twin = self.program.clone()
        rounded = static_activations(twin)
        _restore(linear for name in kept for linear in rounded[name])
        twin.graph.eliminate_dead_code(has_effect)
        outputs: list[Tensor] = []
        for sample in self.samples:
            outputs.append(real_rows(_first(run(twin, sample.inputs)), sample.tokens).double())
        return outputs


def _first(outputs: list[Tensor]) -> Tensor:
    """The first floating output."""
    floating = [value for value in outputs if value.is_floating_point()]
    if not floating:
        raise CalibrationError(
            "mixed-precision judges by a floating output and the model has none. Capture a model "
            "that returns logits or hidden states."
        )
    return floating[0]
