"""The search of smoothing scales: what it expects is what rounding does, and it never loses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.equivalence.clipping import Clipping, tail_index
from fxopt.passes.equivalence.rounding_error import Rounding, expected_error, rounding_error
from fxopt.passes.equivalence.scale_search import best_scale
from fxopt.passes.equivalence.smoothing import smoothing_sites
from tests.passes.equivalence.harness import canonical


def each_channel(scale: torch.Tensor) -> torch.Tensor:
    """Every channel is a coordinate of its own."""
    return scale


SCHEMES = [("token", True), ("token", False), ("tensor", True), ("tensor", False)]


def rounding(seed: int, granularity: str, symmetric: bool, spread: float, linears=2) -> Rounding:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(48, generator=generator))
    rows = torch.randn(200, 48, generator=generator) * channels + 0.5
    weights = [torch.randn(24, 48, generator=generator) for _ in range(linears)]
    ends = rows.amin(0), rows.amax(0)
    return Rounding(rows, weights, *ends, granularity, symmetric, tokens=len(rows))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(SCHEMES),
    scale_spread=st.floats(0, 1),
)
def test_the_expected_error_is_that_of_rounding(seed, scheme, scale_spread):
    given_rounding = rounding(seed, *scheme, spread=1.0)
    scale = torch.exp(scale_spread * torch.randn(48, generator=torch.Generator().manual_seed(1)))
    expected = float(expected_error(given_rounding, scale))
    # Independent and uniform is a model: entries below half a step err by less, and the errors of
    # 200 rows scatter about it.
    assert expected == pytest.approx(rounding_error(given_rounding, scale), rel=0.35)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_beats_its_start_and_no_scale(scheme):
    outliers = rounding(0, *scheme, spread=1.5)
    start = outliers.rows.abs().amax(0).sqrt().double()
    # As if no new token went beyond those seen: the tests of clipping are below.
    outliers = replace(outliers, tokens=10**9)
    found = best_scale([outliers], [each_channel], [start])
    assert rounding_error(outliers, found) < 0.95 * rounding_error(outliers, start)
    assert rounding_error(outliers, found) < 0.9 * rounding_error(outliers, None)


def test_a_layer_that_rounds_exactly_keeps_its_channels():
    rows = torch.randint(-127, 128, (50, 16), generator=torch.Generator().manual_seed(0)).float()
    rows[:, 0] = 127.0
    exact = Rounding(rows, [torch.eye(16)], rows.amin(0), rows.amax(0), "token", True, 50)
    assert rounding_error(exact, None) == 0
    assert best_scale([exact], [each_channel], [torch.linspace(1, 2, 16).double()]) is None


def test_channels_of_one_coordinate_share_their_factor():
    """Two query heads read one kv head: their channels are multiplied alike."""
    program = canonical("llama")
    site = next(
        site
        for site in smoothing_sites(program)
        if site.symmetry is not None and site.readings[0].channels.shape[1] == 2
    )
    factors = torch.linspace(1, 2, site.symmetry.size)
    scale = site.readings[0].spread(factors)
    torch.testing.assert_close(site.gather([scale]), factors.double())
    assert scale.unique().numel() == site.symmetry.size
    assert scale.numel() == 2 * site.symmetry.size


def heavy_tailed(seed: int, symmetric: bool) -> tuple[Rounding, Rounding]:
    """Static ranges from 256 tokens, judged on those and on 4096 new ones."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(torch.randn(128, generator=generator))
    shape = 256 + 4096, 128
    spread = torch.exp(0.8 * torch.randn(shape, generator=generator))
    rows = torch.randn(shape, generator=generator) * spread * channels
    seen, new = rows[:256], rows[256:]
    columns = torch.exp(0.5 * torch.randn(128, generator=generator))
    weights = [torch.randn(32, 128, generator=generator) * columns for _ in range(2)]
    ends = seen.amin(0), seen.amax(0)
    calibrated = Rounding(seen, weights, *ends, "tensor", symmetric, tokens=256)
    return calibrated, replace(calibrated, rows=new)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_static_range_is_searched_for_tokens_that_were_not_seen(seed, symmetric):
    calibrated, new = heavy_tailed(seed, symmetric)
    start = calibrated.rows.abs().amax(0).sqrt().double()
    fitted = best_scale([replace(calibrated, tokens=10**9)], [each_channel], [start])
    found = best_scale([calibrated], [each_channel], [start])
    assert rounding_error(calibrated, fitted) < rounding_error(calibrated, found)
    assert rounding_error(new, found) < 0.75 * rounding_error(new, fitted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_falls_with_tokens_and_with_room(symmetric):
    calibrated, _ = heavy_tailed(0, symmetric)
    even = calibrated.rows.abs().amax(0)
    room = even.clone()
    room[1:] *= 2  # the first channel sets the range
    expected = float(Clipping(calibrated).error(even))
    assert float(Clipping(calibrated).error(room)) < 0.5 * expected
    many = Clipping(replace(calibrated, tokens=2560))
    assert float(many.error(even)) == pytest.approx(expected / 10, rel=1e-5)


def test_ranges_chosen_per_token_clip_nothing():
    calibrated, _ = heavy_tailed(0, symmetric=True)
    assert float(Clipping(replace(calibrated, granularity="token")).error(torch.ones(128))) == 0


def test_the_tail_index_is_that_of_a_pareto_tail():
    """P(x > u) = u^(-1/g) has the tail index g; channels without a positive tail do not count."""
    uniform = torch.rand(20000, 33, generator=torch.Generator().manual_seed(0))
    pareto = uniform.double().pow(-0.3)
    pareto[:, 0] = -1
    assert float(tail_index(pareto.topk(301, dim=0)[0])) == pytest.approx(0.3, rel=0.1)
    assert float(tail_index(-torch.ones(4, 8))) == 0
