"""The search of smoothing scales: what it expects is what rounding does, and it never loses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.equivalence.readers import readers
from fxopt.passes.equivalence.rounding_error import Rounding, expected_error, rounding_error
from fxopt.passes.equivalence.scale_search import best_scale
from fxopt.passes.equivalence.smoothing import SmoothingSite, smoothing_sites
from tests.passes.equivalence.harness import canonical

SCHEMES = [("token", True), ("token", False), ("tensor", True), ("tensor", False)]


def rounding(seed: int, granularity: str, symmetric: bool, spread: float, linears=2) -> Rounding:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(48, generator=generator))
    rows = torch.randn(200, 48, generator=generator) * channels + 0.5
    weights = [torch.randn(24, 48, generator=generator) for _ in range(linears)]
    return Rounding(rows, weights, rows.amin(0), rows.amax(0), granularity, symmetric)


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
    site = SmoothingSite(readers(canonical("bert"))[0], None, ())
    outliers = rounding(0, *scheme, spread=1.5)
    start = outliers.rows.abs().amax(0).sqrt().double()
    found = best_scale(outliers, site, [start])
    assert rounding_error(outliers, found) < 0.95 * rounding_error(outliers, start)
    assert rounding_error(outliers, found) < 0.9 * rounding_error(outliers, None)


def test_a_layer_that_rounds_exactly_keeps_its_channels():
    site = SmoothingSite(readers(canonical("bert"))[0], None, ())
    rows = torch.randint(-127, 128, (50, 16), generator=torch.Generator().manual_seed(0)).float()
    rows[:, 0] = 127.0
    exact = Rounding(rows, [torch.eye(16)], rows.amin(0), rows.amax(0), "token", True)
    assert rounding_error(exact, None) == 0
    assert best_scale(exact, site, [torch.linspace(1, 2, 16).double()]) is None


def test_channels_of_one_coordinate_share_their_factor():
    """Two query heads read one kv head: their channels are multiplied alike."""
    program = canonical("llama")
    site = next(
        site
        for site in smoothing_sites(program)
        if site.symmetry is not None and site.edits[0].positions.shape[2] == 2
    )
    factors = torch.linspace(1, 2, site.symmetry.size)
    scale = site.spread(factors)
    torch.testing.assert_close(site.gather(scale), factors.double())
    assert scale.unique().numel() == site.symmetry.size
    assert scale.numel() == 2 * site.symmetry.size
