"""AWQ scales: protect the columns of weights that large activations meet.

    s_j = mean|x_j|^ratio, divided by sqrt(max s min s),    y = (x / s) (W diag(s))^T
    ratio "auto": the one of 0, 0.05, ... 0.95 with the least
    sum_t c_t || x_t (Q(W diag(s)) diag(1/s) - W)^T ||^2,    c_t = 1 / (||y_t||^2 + median ||y||^2)

Shapes: x [..., d] over all calibration tokens, x_t some of them; s [d]; W [n, d], over all linears
    that read x; y_t their outputs. For "auto" the mean is weighted by sqrt(c_t): a token whose
    activations are massive would else be the only one that counts.
Exactness: equal over the reals. `weights` says how the weights will be rounded: the same as in
    `quantize` or `gptq`, which follow. Ratio 0 is among the candidates, so that no site errs more
    than without a scale. Deviations: the error is that of the
    linears, not of their block; the weights c_t.
Source: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration, MLSys 2024, arXiv:2306.00978.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.rounding_error import token_weights
from fxopt.passes.equivalence.smoothing import SmoothingSite, scale_site, smoothing_sites
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import WeightOptions

SMALLEST = 1e-4
ROWS = 512
RATIOS = tuple(step / 20 for step in range(20))


@register("awq-scale")
@dataclass(frozen=True)
class AwqScale(Pass):
    """Scale channels by a power of their mean activation, where the scale can be folded."""

    ratio: float | Literal["auto"] = "auto"
    weights: WeightOptions = field(default_factory=lambda: WeightOptions("int4", "group", 64))
    ride: bool = False

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate", "equalize")
    before = ("quantize",)

    def __post_init__(self) -> None:
        if self.ratio != "auto" and not 0 <= self.ratio <= 1:
            raise RecipeError(f"ratio {self.ratio} is not between 0 and 1, nor 'auto'.")
        self.weights.refuse_heads("awq-scale")

    def needs(self) -> tuple[Calibration, ...]:
        """The mean of |x| per channel of every linear's input; for "auto", some rows."""
        return (Calibration("rows", ROWS),) if self.ratio == "auto" else (Calibration("mean_abs"),)

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Scale every activation whose scale folds; with `ride`, the others in the graph."""
        changes = Changes(program)
        for site in smoothing_sites(program):
            context.progress(site.reader.path)
            reason = self._refused(program, site)
            if reason is not None:
                changes.refuse(site.reader.path, reason)
                continue
            scale_site(program, changes, site, self._scale(program, site, context))
        return changes.result()

    def _refused(self, program: Program, site: SmoothingSite) -> str | None:
        if site.symmetry is None and not self.ride:
            return site.reason
        shapes = [tuple(program.weight(name).shape) for name in site.reader.weights]
        misfits = [self.weights.misfit(shape) for shape in shapes]
        # Where none of the weights will be rounded there is nothing to protect.
        return misfits[0] if self.ratio == "auto" and all(misfits) else None

    def _scale(self, program: Program, site: SmoothingSite, context: Context) -> Tensor:
        name = site.reader.source.name
        known = context.statistics["rows" if self.ratio == "auto" else "mean_abs"]
        if name not in known:
            raise CalibrationError(
                f"the input of {site.reader.path} was never reached by the calibration data."
            )
        if self.ratio != "auto":
            return _power(site, known[name], self.ratio)
        weights = [program.weight(weight).float() for weight in site.reader.weights]
        energies = torch.stack([(known[name] @ w.T).square().sum(1) for w in weights]).sum(0)
        counts = token_weights(energies, energies.median())[:, None]
        mean = (known[name].abs() * counts.sqrt()).mean(0)
        moments = known[name].T @ (known[name] * counts)
        candidates = [_power(site, mean, ratio) for ratio in RATIOS]
        errors = [self._error(weights, moments, scale.float()) for scale in candidates]
        return candidates[errors.index(min(errors))]

    def _error(self, weights: list[Tensor], moments: Tensor, scale: Tensor) -> float:
        """How far the outputs move when W diag(s) is rounded."""
        total = 0.0
        for weight in weights:
            if self.weights.misfit(tuple(weight.shape)) is not None:
                continue  # it will not be rounded
            wide = weight * scale
            difference = choose_grid(wide, self.weights).round(wide) / scale - weight
            total += float(((difference @ moments) * difference).sum())
        return total


def _power(site: SmoothingSite, mean: Tensor, ratio: float) -> Tensor:
    """Channels that share a coordinate of the symmetry share the largest mean."""
    shared = mean if site.symmetry is None else site.gather(mean)
    scale = (shared.double() ** ratio).clamp(SMALLEST)
    scale = scale / torch.sqrt(scale.max() * scale.min())
    return scale if site.symmetry is None else site.spread(scale)
