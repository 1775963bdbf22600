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

# Factors of coordinates [size] as scales of channels [d].
Spread = Callable[[Tensor], Tensor]
STEPS = 100
RATE = 0.03


def best_scale(
    roundings: Sequence[Rounding], spreads: Sequence[Spread], candidates: Sequence[Tensor]
) -> Tensor | None:
    """The best of no scale, the candidates [size] and what descent finds from the best of them.

    `spreads` says what the factors of coordinates are for the channels of each rounded activation.
    """
    site = [
        (rounding, Clipping(rounding), spread)
        for rounding, spread in zip(roundings, spreads, strict=True)
    ]

    def expected(factors: Tensor) -> Tensor:
        total = torch.zeros(())
        for rounding, clipping, spread in site:
            scale = spread(factors.float())
            total = total + expected_error(rounding, scale) + clipping.error(scale)
        return total

    def measured(factors: Tensor | None) -> float:
        total = 0.0
        for rounding, clipping, spread in site:
            scale = None if factors is None else spread(factors)
            known = torch.ones_like(rounding.low) if scale is None else scale.float()
            total += rounding_error(rounding, scale) + float(clipping.error(known))
        return total

    start = min(candidates, key=lambda factors: float(expected(factors)))
    return min([None, start, _descend(expected, start)], key=measured)


def _descend(expected: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    logarithm = start.log().float().requires_grad_(True)
    adam = torch.optim.Adam([logarithm], lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, STEPS)
    best, least = start, float("inf")
    with torch.enable_grad():
        for _ in range(STEPS):
            factors = logarithm.exp()
            error = expected(factors)
            if (value := error.item()) < least:
                best, least = factors.detach().double(), value
            adam.zero_grad()
            error.backward()
            adam.step()
            decay.step()
    return best
