"""Ranges of an activation for a static scale, from one streaming histogram.

    minmax          [min x, max x]
    moving_average  m <- (1 - c) m_batch + c m,  c = 0.9
    percentile      [q_{100-p}(x), q_p(x)]
    mse             argmin over ranges of  sum_i n_i (x_i - Q(x_i))^2
    kl              argmin over t of  KL(P_t || Q_t),  P_t: |x| with all beyond t in its last bin

Shapes: counts [2 N], bin i holding the x with floor(x / w) = i - N; ranges are pairs of numbers.
Exactness: a bin is at most 1/2048 of the reach. w is a power of two and doubles when x leaves the
    histogram, which joins bins in pairs: any split of the data into batches gives the same counts.
Source: Migacz, 8-bit Inference with TensorRT, GTC 2017 (kl); Nagel et al., A White Paper on Neural
    Network Quantization, 2021, arXiv:2106.08295 (mse); Jacob et al., Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, arXiv:1712.05877
    (moving average). Deviation: without a symmetric grid `kl` cuts both sides at the same |x|.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Observer = Literal["minmax", "moving_average", "percentile", "mse", "kl"]
# Rounds values [n] to the codes of a range (low, high) and back.
Round = Callable[[Tensor, Tensor, Tensor], Tensor]
Range = tuple[float, float]

HALF = 4096  # bins on either side of zero
MOMENTUM = 0.9
_LEAST_EXPONENT = -100
_CANDIDATES = 100
_STRIDES = 256
_SMOOTHING = 1e-9


@dataclass
class Histogram:
    """How many values of a tensor were seen between i w and (i + 1) w; w = 2^exponent / N."""

    exponent: int = _LEAST_EXPONENT
    low: float = math.inf
    high: float = -math.inf
    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * HALF, dtype=torch.int64))

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent / HALF

    @property
    def reach(self) -> float:
        """The largest |x| seen."""
        return max(-self.low, self.high)

    def add(self, x: Tensor) -> None:
        """Take in the values of a tensor."""
        x = x.detach().float().flatten()
        if x.numel() == 0:
            return
        low, high = (float(edge) for edge in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if reach > 0:  # zeros lie in a bin of any width
            self._widen(math.frexp(reach)[1])
        index = torch.floor(x / self.width).to(torch.int64) + HALF
        self.counts += torch.bincount(index, minlength=2 * HALF)

    def _widen(self, exponent: int) -> None:
        """Double the width of the bins until they reach 2^exponent."""
        steps = exponent - self.exponent
        if steps <= 0:
            return
        index = (torch.arange(2 * HALF) - HALF) >> min(steps, 62)
        self.counts = torch.zeros_like(self.counts).index_add(0, index + HALF, self.counts)
        self.exponent = exponent

    def points(self) -> tuple[Tensor, Tensor]:
        """The centres of the bins that hold something [n], float64, and their counts [n]."""
        held = self.counts.nonzero().flatten()
        centres = (held.double() - HALF + 0.5) * self.width
        return centres.clamp(self.low, self.high), self.counts[held].double()


def moving_average_range(batches: Tensor) -> Range:
    """The moving average of the ranges [batches, 2] in the order in which they came."""
    average = batches[0].double()
    for batch in batches[1:].double():
        average = (1 - MOMENTUM) * batch + MOMENTUM * average
    return float(average[0]), float(average[1])


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The bins between which all but (100 - percentile) % of the values lie, on either side."""
    total = int(histogram.counts.sum())
    beyond = math.floor(total * (100 - percentile) / 100 + 1e-9)
    below = histogram.counts.cumsum(0)
    first = int((below > beyond).nonzero()[0])
    last = int((below >= total - beyond).nonzero()[0])
    low, high = (first - HALF) * histogram.width, (last + 1 - HALF) * histogram.width
    return max(low, histogram.low), min(high, histogram.high)


def mse_range(histogram: Histogram, rounded: Round, symmetric: bool) -> Range:
    """The range of least squared error on the histogram; never worse than the whole range.

    Shares k / 100 of the reach are tried; of an asymmetric range one edge after the other, until
    neither improves.
    """
    x, counts = histogram.points()
    shares = torch.arange(_CANDIDATES, 0, -1, dtype=torch.float64) / _CANDIDATES

    def best(low: Tensor, high: Tensor) -> tuple[float, int]:
        errors = [
            float(((x - rounded(x, *edges)).square() * counts).sum())
            for edges in zip(low, high, strict=True)
        ]
        return min((error, index) for index, error in enumerate(errors))

    if symmetric:
        reach = shares * histogram.reach
        chosen = float(reach[best(-reach, reach)[1]])
        return -chosen, chosen
    low, high = torch.tensor(min(histogram.low, 0.0)), torch.tensor(max(histogram.high, 0.0))
    edges, least = [low.double(), high.double()], math.inf
    full = tuple(edges)
    while True:
        for side in (0, 1):
            tried = [edge.expand(_CANDIDATES) for edge in edges]
            tried[side] = shares * full[side]
            error, index = best(tried[0], tried[1])
            edges[side] = tried[side][index]
        if not error < least:
            return float(edges[0]), float(edges[1])
        least = error


def kl_range(histogram: Histogram, levels: int) -> Range:
    """The range whose rounded magnitudes have the distribution closest to those of the tensor."""
    folded = (histogram.counts[HALF:] + histogram.counts[:HALF].flip(0)).double()
    held = folded.nonzero()
    used = int(held[-1]) + 1
    if histogram.reach == 0 or used <= levels:
        return histogram.low, histogram.high
    ends = torch.linspace(used, levels, _STRIDES).round().long().tolist()
    distances = [_divergence(folded[:used], end, levels) for end in ends]
    threshold = ends[distances.index(min(distances))] * histogram.width  # the widest of equals
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _divergence(counts: Tensor, end: int, levels: int) -> float:
    """KL(P || Q) where |x| is cut off at bin `end` and the rest is merged to `levels` levels."""
    kept = counts[:end]
    p = kept.clone()
    p[-1] += counts[end:].sum()
    level = torch.arange(end) * levels // end
    mass = torch.zeros(levels, dtype=torch.float64).index_add(0, level, kept)
    sources = torch.zeros(levels, dtype=torch.float64).index_add(0, level, (kept > 0).double())
    q = torch.where(kept > 0, (mass / sources.clamp(min=1))[level], 0.0)
    p, q = p / p.sum(), q / q.sum().clamp(min=1)
    held = p > 0
    return float((p[held] * (p[held] / q[held].clamp(min=_SMOOTHING)).log()).sum())
