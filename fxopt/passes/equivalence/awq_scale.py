"""AWQ scales: protect the columns of weights that large activations meet.

    s_j = mean|x_j|^ratio, divided by sqrt(max s min s),    y = (x / s) (W diag(s))^T

Shapes: x [..., d] over all calibration tokens; s [d]; W [n, d].
Exactness: equal over the reals. The ratio is given; a search belongs to the quantization of
    weights, which knows what it costs.
Source: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration, MLSys 2024, arXiv:2306.00978.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.smoothing import scale_site, smoothing_sites

SMALLEST = 1e-4


@register("awq-scale")
@dataclass(frozen=True)
class AwqScale(Pass):
    """Scale channels by their mean activation, where the scale can be folded."""

    ratio: float = 0.5

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate", "equalize")
    before = ("quantize",)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise RecipeError(f"ratio {self.ratio} is not between 0 and 1.")

    def needs(self) -> tuple[Calibration, ...]:
        """The mean of |x| per channel of every linear's input."""
        return (Calibration("mean_abs"),)

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Scale every activation whose scale folds; weight-only rounding gains nothing elsewhere."""
        changes = Changes(program)
        means = context.statistics["mean_abs"]
        for site in smoothing_sites(program):
            name = site.reader.source.name
            if name not in means:
                raise CalibrationError(
                    f"the input of {site.reader.path} was never reached by the calibration data."
                )
            if site.symmetry is None:
                changes.refuse(site.reader.path, site.reason)
                continue
            scale_site(program, changes, site, site.spread(self._scale(site.gather(means[name]))))
        return changes.result()

    def _scale(self, mean: Tensor) -> Tensor:
        scale = (mean**self.ratio).clamp(SMALLEST)
        return scale / torch.sqrt(scale.max() * scale.min())
