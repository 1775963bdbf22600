"""Observers: the histogram does not depend on batches, and ranges keep what they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.analysis.observers import (
    HALF,
    Histogram,
    kl_range,
    moving_average_range,
    mse_range,
    percentile_range,
)

ops = torch.ops.fxopt
seeds = st.integers(0, 10_000)
sizes = st.sampled_from([1e-30, 1e-3, 1.0, 37.0, 3e6, 1e30])


def values(seed: int, size: float, count: int = 500) -> Tensor:
    """Numbers with a few outliers on one side."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x[:3] = 10 * x[:3].abs()
    return x * size


def histogram(*parts: Tensor) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


def rounding(symmetric: bool):
    low, high = (-127, 127) if symmetric else (-128, 127)

    def rounded(x, first, last):
        scale, zero = ops.choose_qparams(torch.stack([first, last]), [-1], symmetric, low, high)
        codes = ops.quantize(x, scale, zero, [-1], torch.int8, low, high)
        return ops.dequantize(codes, scale, zero, [-1], x.dtype)

    return rounded


def error(found: Histogram, edges: tuple[float, float], symmetric: bool) -> float:
    x, counts = found.points()
    low, high = torch.tensor(edges, dtype=torch.float64)
    return float(((x - rounding(symmetric)(x, low, high)).square() * counts).sum())


@settings(max_examples=60, deadline=None)
@given(seed=seeds, size=sizes, cut=st.lists(st.integers(0, 500), max_size=4), data=st.randoms())
def test_batches_do_not_matter(seed, size, cut, data):
    x = values(seed, size)
    order = list(range(500))
    data.shuffle(order)
    parts = torch.tensor_split(x[order], sorted(cut))
    whole, streamed = histogram(x), histogram(*parts)
    assert torch.equal(whole.counts, streamed.counts)
    assert (whole.exponent, whole.low, whole.high) == (
        streamed.exponent,
        streamed.low,
        streamed.high,
    )
    assert int(whole.counts.sum()) == 500


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=sizes, at=st.integers(0, 2))
def test_a_batch_of_zeros_does_not_widen_the_bins(seed, size, at):
    parts = list(values(seed, size).split(250))
    parts.insert(at, torch.zeros(100))
    found, plain = histogram(*parts), histogram(values(seed, size))
    assert found.width == plain.width
    plain.counts[HALF] += 100
    assert torch.equal(found.counts, plain.counts)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=sizes)
def test_every_value_lies_in_its_bin(seed, size):
    x = values(seed, size, 50)
    found = histogram(x[:1], x[1:])
    index = torch.floor(x.double() / found.width).long() + HALF
    assert torch.equal(found.counts, torch.bincount(index, minlength=2 * HALF))
    assert found.width <= found.reach / (HALF / 2)
    centres, _ = found.points()
    assert float(centres.min()) >= float(x.min())
    assert float(centres.max()) <= float(x.max())


@settings(max_examples=60, deadline=None)
@given(seed=seeds, size=sizes)
def test_percentile_100_is_minmax(seed, size):
    x = values(seed, size)
    assert percentile_range(histogram(x), 100.0) == (float(x.min()), float(x.max()))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, percentile=st.floats(60, 99.9))
def test_a_percentile_leaves_no_more_than_its_share_outside(seed, percentile):
    x = values(seed, 1.0)
    found = histogram(x)
    low, high = percentile_range(found, percentile)
    allowed = 500 * (100 - percentile) / 100
    assert int((x < low).sum()) <= allowed + 1e-6
    assert int((x > high).sum()) <= allowed + 1e-6
    # Narrower by a bin, and more than that would lie outside.
    assert int((x < low + 2 * found.width).sum()) > allowed - 1 or low == found.low
    wider = percentile_range(found, min(100.0, percentile + 5))
    assert wider[0] <= low
    assert wider[1] >= high


@settings(max_examples=15, deadline=None)
@given(seed=seeds, size=st.sampled_from([1e-3, 1.0, 1e6]), symmetric=st.booleans())
def test_the_mse_range_never_errs_more_than_the_whole_range(seed, size, symmetric):
    found = histogram(values(seed, size))
    chosen = mse_range(found, rounding(symmetric), symmetric)
    whole = (min(found.low, 0.0), max(found.high, 0.0))
    assert error(found, chosen, symmetric) <= error(found, whole, symmetric) * (1 + 1e-9)
    assert whole[0] - 1e-9 * size <= chosen[0] or symmetric
    assert chosen[1] <= found.reach


def test_ranges_by_error_and_by_distribution_cut_off_a_lone_outlier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator)
    x[0] = 100.0
    found = histogram(x)
    for low, high in (
        mse_range(found, rounding(True), True),
        mse_range(found, rounding(False), False),
        kl_range(found, 128),
        percentile_range(found, 99.99),
    ):
        assert 3 < high < 90
        assert -90 < low < -2


def kl_by_loops(x: Tensor, levels: int) -> dict[float, float]:
    """The divergence of each threshold, spelled out as in the talk, level by level."""
    width = 2.0 ** math.ceil(math.log2(float(x.abs().max()))) / HALF
    counts = [0] * HALF
    for value in x.abs().tolist():
        counts[min(int(value / width), HALF - 1)] += 1
    used = max(index for index, count in enumerate(counts) if count) + 1
    found: dict[float, float] = {}
    for end in {round(float(e)) for e in torch.linspace(used, levels, 256)}:
        p = [float(count) for count in counts[:end]]
        p[-1] += sum(counts[end:])
        q = [0.0] * end
        for level in range(levels):
            bins = range(-(-level * end // levels), -(-(level + 1) * end // levels))
            held = [i for i in bins if counts[i]]
            for i in held:
                q[i] = sum(counts[i] for i in held) / len(held)
        both = [(a / sum(p), max(b / max(sum(q), 1), 1e-9)) for a, b in zip(p, q, strict=True)]
        found[end * width] = sum(a * math.log(a / b) for a, b in both if a)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_kl_chooses_what_the_loops_of_its_source_choose(seed):
    x = values(seed, 1.0, 3000)
    low, high = kl_range(histogram(x), 16)
    divergences = kl_by_loops(x, 16)
    least = min(divergences.values())
    threshold = max(t for t, d in divergences.items() if d == pytest.approx(least, abs=1e-12))
    assert high == min(float(x.max()), threshold)
    assert low == max(float(x.min()), -threshold)


def test_kl_keeps_a_clean_range():
    x = torch.linspace(-1, 1, 100_000)
    low, high = kl_range(histogram(x), 128)
    assert high == pytest.approx(1, abs=0.02)
    assert low == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("constant", [0.0, 2.5, -3.0, 1e-20])
def test_constants_keep_their_range(constant):
    found = histogram(torch.full((64,), constant))
    constant = float(torch.tensor(constant))
    assert percentile_range(found, 99.99) == (constant, constant)
    assert kl_range(found, 128) == pytest.approx((constant, constant))
    for symmetric in (True, False):
        edges = mse_range(found, rounding(symmetric), symmetric)
        assert max(-edges[0], edges[1]) == pytest.approx(abs(constant), abs=1e-30)
        assert error(found, edges, symmetric) <= 1e-12 * constant**2


def test_a_moving_average_weighs_by_age():
    batches = torch.tensor([[-1.0, 2.0], [-3.0, 2.0], [-1.0, 4.0]])
    low, high = moving_average_range(batches)
    assert low == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -3) + 0.1 * -1)
    assert high == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert moving_average_range(batches[:1]) == (-1, 2)
