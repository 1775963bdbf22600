"""Cross-layer equalization."""

from dataclasses import replace

import pytest
import torch

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Symmetries, symmetries
from fxopt.errors import RecipeError
from fxopt.passes.base import Context
from fxopt.passes.equivalence.equalize import Equalize, _factors
from tests.passes.equivalence.harness import canonical, idempotent, run, sites


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3", "bert", "t5"])
def test_both_sides_of_every_axis_reach_equally_far(model):
    after = run(canonical(model), Equalize(iterations=40))
    assert sites(after)
    for symmetry in symmetries(after, Kind.SCALE):
        assert float(_factors(after, symmetry).log().abs().max()) < 0.01


@pytest.mark.parametrize("model", ["llama", "gptneox"])
def test_every_axis_is_one_site_of_the_report(model):
    """GPT-NeoX rotates some channels of a head: its two axes hold the same tensors."""
    before = canonical(model)
    result = Equalize().run(before.clone(), Context())
    assert len(result.sites) == len(symmetries(before, Kind.SCALE).found)


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


@pytest.mark.parametrize("model", ["gpt2", "phi3"])
def test_queries_and_keys_of_one_weight_are_two_sides(model):
    """Their rows stand in one tensor, and one is divided where the other is multiplied."""
    before = canonical(model)
    fused = [s for s in symmetries(before, Kind.SCALE) if s.role == "query_key"]
    assert fused
    for symmetry in fused:
        assert {edit.inverse for edit in symmetry.weights} == {False, True}
        assert float(_factors(before, symmetry).log().abs().max()) > 0.01
    after = run(before, Equalize(iterations=40))
    assert {symmetry.path for symmetry in fused} <= set(sites(after))


def test_an_axis_with_one_side_is_refused_with_the_reason(monkeypatch):
    found = symmetries(canonical("llama"), Kind.SCALE)
    alone = replace(found.found[0], edits=found.found[0].weights[:1])
    monkeypatch.setattr(
        "fxopt.passes.equivalence.equalize.symmetries",
        lambda *_: Symmetries(Kind.SCALE, found.unit, [alone]),
    )
    program = canonical("llama").clone()
    result = Equalize().run(program, Context())
    assert not result.sites
    (refusal,) = result.refusals
    assert refusal.site == alone.weights[0].name
    assert "no second range to make equal" in refusal.reason


def test_options_are_checked():
    with pytest.raises(RecipeError, match="at least one iteration"):
        Equalize(iterations=0)
