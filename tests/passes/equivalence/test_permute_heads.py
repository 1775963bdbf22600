"""Heads in another order: within the group of a kv head, and whole groups."""

import pytest
import torch

from fxopt.passes.base import Context
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from tests.passes.equivalence.harness import canonical, changed, details, refusals, run, sites


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3"])
def test_grouped_queries_move_in_their_group_and_groups_move_whole(model):
    before = canonical(model)
    after = run(before, PermuteHeads(by="random"))
    assert sum(d.startswith("2 blocks of 2 heads") for d in details(after)) == 2
    assert sum(d.startswith("2 heads") for d in details(after)) == 2
    # By itself a kv head stays; with its group it did move.
    assert "a kv head moves only with its whole group" not in refusals(after)


def test_a_kv_head_whose_group_stays_says_why():
    before = canonical("llama")
    path = "model.layers.0.self_attn.q_proj"
    program = before.clone()
    result = PermuteHeads(by="given", orders={path: [1, 0]}).run(program, Context())
    stays = [r for r in result.refusals if "only with its whole group" in r.reason]
    assert any("layers.1." in r.site for r in stays)


@pytest.mark.parametrize("model", ["bert", "gpt2", "gptneox"])
def test_without_groups_each_head_moves_once(model):
    before = canonical(model)
    after = run(before, PermuteHeads(by="random"))
    assert len(sites(after)) == 2
    for name in changed(before, after):
        old, new = before.weight(name), after.weight(name)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_a_bias_per_head_ties_the_layers_that_read_it():
    after = run(canonical("t5"), PermuteHeads(by="random"))
    tied = [detail for detail in details(after) if "relative_attention_bias.weight" in detail]
    assert len(tied) == 2


def test_a_bias_of_zeros_for_every_head_ties_nothing():
    """T5 adds zeros [1, H, S, T] to the scores of its cross-attention."""
    after = run(canonical("t5"), PermuteHeads(by="random"))
    assert sum("EncDecAttention" in path for path in sites(after)) == 2
    assert "a mask or bias belongs to the head" not in refusals(after)
