"""SmoothQuant: move the reach of outlier channels from activations into weights.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha),    y = (x / s) (W diag(s))^T

Shapes: x [..., d], over all calibration tokens; W [n, d], over all linears and experts that read x;
    s [d]. Channels that share a coordinate share s: a kv head's channel over its query heads, and
    all x of one symmetry, as those of ALBERT's layers.
Exactness: equal over the reals. Deviations: the inputs of o and down projections are smoothed
    too; with alpha "auto" each site goes on from its best alpha to the scales at which its rounded
    linears err least (see scale_search). With granularity "tensor" that error counts what a static
    range will cut off from tokens that calibration did not see (see clipping).
Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models, ICML 2023, arXiv:2211.10438.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.rounding_error import Rounding
from fxopt.passes.equivalence.scale_search import best_scale
from fxopt.passes.equivalence.smoothing import (
    Reading,
    SmoothingSite,
    scale_site,
    smoothing_sites,
)

ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROWS = 1024
SMALLEST = 1e-5


@register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Scale channels so that activations and weights are equally hard to round."""

    alpha: float | Literal["auto"] = 0.5
    fold: bool = True
    ride: bool = True
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate", "equalize")
    before = ("quantize",)

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha {self.alpha} is not between 0 and 1, nor 'auto'.")

    def needs(self) -> tuple[Calibration, ...]:
        """The reach of every linear's input; for "auto", some rows too, and of how many tokens."""
        ranges = (Calibration("minimum"), Calibration("maximum"))
        searched = (Calibration("rows", ROWS), Calibration("tokens"))
        return (*ranges, *searched) if self.alpha == "auto" else ranges

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Smooth every activation that linears read.

        Readers go first: folding their scale changes the rows that an earlier site measures, and
        so a second run at alpha 0.5 finds nothing to do.
        """
        changes = Changes(program)
        for site in reversed(smoothing_sites(program, self.fold)):
            context.progress(site.path)
            if site.symmetry is None and not self.ride:
                changes.refuse(site.path, site.reason)
                continue
            scale = self._scale(program, site, context)
            if scale is not None:
                scale_site(program, changes, site, scale)
        return changes.result()

    def _scale(self, program: Program, site: SmoothingSite, context: Context) -> Tensor | None:
        ranges = [_range(reading, context) for reading in site.readings]
        reach = site.gather(torch.maximum(-low, high) for low, high in ranges)
        columns = site.gather(reading.column_reach(program) for reading in site.readings)
        if self.alpha != "auto":
            return _smooth(reach, columns, self.alpha)
        roundings = [
            self._rounding(program, reading, low, high, context)
            for reading, (low, high) in zip(site.readings, ranges, strict=True)
        ]
        spreads = [reading.spread for reading in site.readings]
        return best_scale(roundings, spreads, [_smooth(reach, columns, a) for a in ALPHAS])

    def _rounding(
        self, program: Program, reading: Reading, low: Tensor, high: Tensor, context: Context
    ) -> Rounding:
        name = reading.reader.source.name
        return Rounding(
            rows=context.statistics["rows"][name],
            weights=[weight.float() for weight in reading.columns(program)],
            low=low.float(),
            high=high.float(),
            granularity=self.granularity,
            symmetric=self.symmetric,
            tokens=int(context.statistics["tokens"][name]),
        )


def _range(reading: Reading, context: Context) -> tuple[Tensor, Tensor]:
    name = reading.reader.source.name
    try:
        low, high = context.statistics["minimum"][name], context.statistics["maximum"][name]
    except KeyError as error:
        raise CalibrationError(
            f"the input of {reading.reader.path} was never reached by the calibration data. Pass "
            "calibration data that uses this part of the model."
        ) from error
    return low.double(), high.double()


def _smooth(reach: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """The scale s = a^alpha / w^(1 - alpha); channels that are zero on either side keep s = 1."""
    dead = (reach < SMALLEST) | (columns < SMALLEST)
    scale = reach.clamp(SMALLEST) ** alpha / columns.clamp(SMALLEST) ** (1 - alpha)
    return torch.where(dead, 1.0, scale.clamp(SMALLEST))
