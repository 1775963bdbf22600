"""Search the per-channel scale at which the rounded linears of one site err least.

    s* = argmin over s of E(s) + C(s),    s = exp(z),    z by Adam from the best given scale

E is the expected error of rounding and C, for a static range, that of cutting off new tokens; both
are differentiable and need no product of matrices. What is found is kept only if, with E measured
by rounding, it errs less than no scale and than the start.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxopt.passes.equivalence.clipping import Clipping
from fxopt.passes.equivalence.rounding_error import Rounding, expected_error, rounding_error
from fxopt.passes.equivalence.smoothing import SmoothingSite

STEPS = 100
RATE = 0.03


def best_scale(
    rounding: Rounding, site: SmoothingSite, candidates: Sequence[Tensor]
) -> Tensor | None:
    """The best of no scale, the candidates [d] and what descent finds from the best of them."""
    clipping = Clipping(rounding)

    def expected(scale: Tensor) -> Tensor:
        scale = scale.float()
        return expected_error(rounding, scale) + clipping.error(scale)

    def measured(scale: Tensor | None) -> float:
        factors = torch.ones_like(rounding.low) if scale is None else scale.float()
        return rounding_error(rounding, scale) + float(clipping.error(factors))

    start = min(candidates, key=lambda scale: float(expected(scale)))
    return min([None, start, _descend(expected, site, start)], key=measured)


def _descend(expected: Callable[[Tensor], Tensor], site: SmoothingSite, start: Tensor) -> Tensor:
    coordinates = start if site.symmetry is None else site.gather(start)
    logarithm = coordinates.log().float().requires_grad_(True)
    adam = torch.optim.Adam([logarithm], lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, STEPS)
    best, least = start, float("inf")
    with torch.enable_grad():
        for _ in range(STEPS):
            scale = logarithm.exp() if site.symmetry is None else site.spread(logarithm.exp())
            error = expected(scale)
            if (value := error.item()) < least:
                best, least = scale.detach().double(), value
            adam.zero_grad()
            error.backward()
            adam.step()
            decay.step()
    return best
