"""Search the per-channel scale at which the rounded linears of one site err least.

    s* = argmin over s of E(s),    s = exp(z),    z by Adam from the best given scale

E is the expected error, which is differentiable and needs no product of matrices; what is found
is kept only if it rounds better than no scale and than the start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.passes.equivalence.rounding_error import Rounding, expected_error, rounding_error
from fxopt.passes.equivalence.smoothing import SmoothingSite

STEPS = 100
RATE = 0.03


def best_scale(
    rounding: Rounding, site: SmoothingSite, candidates: Sequence[Tensor]
) -> Tensor | None:
    """The best of no scale, the candidates [d] and what descent finds from the best of them."""
    start = min(candidates, key=lambda scale: float(expected_error(rounding, scale.float())))
    found = _descend(rounding, site, start)
    return min([None, start, found], key=lambda scale: rounding_error(rounding, scale))


def _descend(rounding: Rounding, site: SmoothingSite, start: Tensor) -> Tensor:
    coordinates = start if site.symmetry is None else site.gather(start)
    logarithm = coordinates.log().float().requires_grad_(True)
    adam = torch.optim.Adam([logarithm], lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, STEPS)
    best, least = start, float("inf")
    with torch.enable_grad():
        for _ in range(STEPS):
            scale = logarithm.exp() if site.symmetry is None else site.spread(logarithm.exp())
            error = expected_error(rounding, scale.float())
            if (value := error.item()) < least:
                best, least = scale.detach().double(), value
            adam.zero_grad()
            error.backward()
            adam.step()
            decay.step()
    return best
