"""Cross-layer equalization."""

import pytest
import torch

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import symmetries
from fxopt.errors import RecipeError
from fxopt.passes.equivalence.equalize import Equalize, _factors
from tests.passes.equivalence.harness import canonical, idempotent, run, sites


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3", "bert", "t5"])
def test_both_sides_of_every_axis_reach_equally_far(model):
    after = run(canonical(model), Equalize(iterations=40))
    assert sites(after)
    for symmetry in symmetries(after, Kind.SCALE):
        assert float(_factors(after, symmetry).log().abs().max()) < 0.01


def test_equalizing_twice_is_equalizing_once():
    idempotent(run(canonical("llama"), Equalize(iterations=40)), Equalize(tolerance=2e-3))


def test_channels_of_zeros_stay():
    before = canonical("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = before.weight(name).clone()
    weight[3] = 0
    before.set_weight(name, weight)
    after = run(before, Equalize())
    assert torch.isfinite(after.weight(name)).all()
    assert not after.weight(name)[3].any()


def test_options_are_checked():
    with pytest.raises(RecipeError, match="at least one iteration"):
        Equalize(iterations=0)
