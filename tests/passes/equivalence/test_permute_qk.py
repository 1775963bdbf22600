"""Channels of queries and keys in another order: freely, or in pairs with their angles."""

import pytest

from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from tests.passes.equivalence.harness import canonical, changed, refusals, run, sites

GROUPED = ("llama", "phi3")


@pytest.mark.parametrize(("model", "count"), [("bert", 2), ("gpt2", 2), ("t5", 6)])
def test_without_rope_channels_move_freely(model, count):
    before = canonical(model)
    after = run(before, PermuteQk(by="random"))
    assert len(sites(after)) == count
    assert len(after.nodes()) == len(before.nodes())
    detail = after.history[-1].sites[0].detail
    assert detail.startswith("4 blocks of 8 query_key coordinates reordered")


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3", "phi3"])
def test_with_rope_whole_pairs_move_and_their_angles_with_them(model):
    before = canonical(model)
    after = run(before, PermuteQk(by="random"))
    detail = after.history[-1].sites[0].detail
    # A norm of all heads alike ties them: then one order for all.
    expected = "4 query_key" if model in ("qwen3", "gemma3") else "2 blocks of 4 query_key"
    assert detail.startswith(expected)
    orders = [name for name in changed(before, after) if name not in before.weights()]
    assert orders
    assert not any(after.weight(name).is_floating_point() for name in orders)


def test_a_partial_rope_leaves_its_channels_among_themselves():
    after = run(canonical("gptneox"), PermuteQk(by="random"))
    assert len(sites(after)) == 4  # per layer: pairs that turn, and channels that do not


def test_a_second_reordering_composes_with_the_first():
    before = canonical("llama")
    after = run(before, PermuteQk(by="random"), PermuteQk(by="random", seed=1))
    assert len(sites(after)) == 2


@pytest.mark.parametrize("model", ["llama", "gptneox", "gptj", "phi3"])
def test_heads_take_angles_of_their_own_along(model):
    """After a reordering per head every head has a table, which moves with it."""
    once = run(canonical(model), PermuteQk(by="random"), PermuteHeads(by="random"))
    assert len(sites(once)) == (4 if model in GROUPED else 2)
    assert "angles" not in refusals(once)
    twice = run(once, PermuteQk(by="random", seed=1), PermuteHeads(by="random", seed=1))
    assert len(sites(twice)) == len(sites(once))


@pytest.mark.parametrize("model", ["gptj", "codegen"])
def test_heads_may_stand_behind_the_tokens(model):
    """Rotary embedding on [B, S, H, D]: pairs that turn, and channels that do not."""
    after = run(canonical(model), PermuteQk(by="random"))
    assert len(sites(after)) == 4
    assert len(sites(run(canonical(model), PermuteHeads(by="random")))) == 2
