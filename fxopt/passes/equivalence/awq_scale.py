"""AWQ scales: protect the columns of weights that large activations meet.

    s_j = mean|x_j|^ratio, divided by sqrt(max s min s),    y = (x / s) (W diag(s))^T
    ratio "auto": the one of 0, 0.05, ... 0.95 with the least
    sum_t c_t || x_t (Q(W diag(s)) diag(1/s) - W)^T ||^2,    c_t = 1 / (||y_t||^2 + median ||y||^2)

Shapes: x [..., d] over all calibration tokens, x_t some of them; s [d]; W [n, d], over all linears
    and experts that read x, and over all x that share a symmetry; y_t their outputs. For "auto" the
    mean is weighted by sqrt(c_t): a token whose activations are massive would else be the only one
    that counts. Experts are judged by all tokens.
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
from fxopt.passes.equivalence.smoothing import (
    Reading,
    SmoothingSite,
    scale_site,
    smoothing_sites,
)
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
            context.progress(site.path)
            reason = self._refused(program, site)
            if reason is not None:
                changes.refuse(site.path, reason)
                continue
            scale_site(program, changes, site, self._scale(program, site, context))
        return changes.result()

    def _refused(self, program: Program, site: SmoothingSite) -> str | None:
        if site.symmetry is None and not self.ride:
            return site.reason
        names = [name for reading in site.readings for name in reading.weights]
        misfits = [self._misfit(program, name) for name in names]
        # Where none of the weights will be rounded there is nothing to protect.
        return misfits[0] if self.ratio == "auto" and all(misfits) else None

    def _misfit(self, program: Program, name: str) -> str | None:
        return self.weights.misfit(tuple(program.weight(name).shape[-2:]))

    def _scale(self, program: Program, site: SmoothingSite, context: Context) -> Tensor:
        known = [self._known(reading, context) for reading in site.readings]
        if self.ratio != "auto":
            return _power(site.gather(known), self.ratio)
        judged = [
            self._judged(program, reading, rows)
            for reading, rows in zip(site.readings, known, strict=True)
        ]
        mean = site.gather(reading.mean for reading in judged)
        candidates = [_power(mean, ratio) for ratio in RATIOS]
        errors = [sum(reading.error(scale) for reading in judged) for scale in candidates]
        return candidates[errors.index(min(errors))]

    def _known(self, reading: Reading, context: Context) -> Tensor:
        """Rows [n, in] of an activation, or the mean of its magnitudes [in]."""
        known = context.statistics["rows" if self.ratio == "auto" else "mean_abs"]
        if reading.reader.source.name not in known:
            raise CalibrationError(
                f"the input of {reading.reader.path} was never reached by the calibration data."
            )
        return known[reading.reader.source.name]

    def _judged(self, program: Program, reading: Reading, rows: Tensor) -> "_Judged":
        weights = [weight.float() for weight in reading.columns(program)]
        energies = torch.stack([(rows @ w.T).square().sum(1) for w in weights]).sum(0)
        counts = token_weights(energies, energies.median())[:, None]
        # What will not be rounded does not err, but counts in how much tokens do.
        fitting = [
            weight
            for name, weight in zip(reading.weights, weights, strict=True)
            if self._misfit(program, name) is None
        ]
        mean = (rows.abs() * counts.sqrt()).mean(0) / counts.sqrt().mean()
        return _Judged(reading, fitting, mean, rows.T @ (rows * counts), self.weights)


@dataclass(frozen=True)
class _Judged:
    """One activation of a site, and what rounding does to the weights that read it."""

    reading: Reading
    weights: list[Tensor]
    mean: Tensor  # of the magnitudes, by how much tokens count, [in]
    moments: Tensor  # [in, in]
    options: WeightOptions

    def error(self, factors: Tensor) -> float:
        """How far the outputs move when W diag(s) is rounded."""
        scale, total = self.reading.spread(factors).float(), 0.0
        for weight in self.weights:
            wide = weight * scale
            difference = choose_grid(wide, self.options).round(wide) / scale - weight
            total += float(((difference @ self.moments) * difference).sum())
        return total


def _power(mean: Tensor, ratio: float) -> Tensor:
    """The scale of each coordinate by the largest mean of the channels that share it."""
    scale = (mean.double() ** ratio).clamp(SMALLEST)
    return scale / torch.sqrt(scale.max() * scale.min())
