"""Heads in another order: within the group of a kv head, and whole groups."""

import pytest
import torch

from fxopt.passes.equivalence.permute_heads import PermuteHeads
from tests.passes.equivalence.harness import canonical, changed, details, refusals, run, sites


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3"])
def test_grouped_queries_move_in_their_group_and_groups_move_whole(model):
    before = canonical(model)
    after = run(before, PermuteHeads(by="random"))
    assert sum(d.startswith("2 blocks of 2 heads") for d in details(after)) == 2
    assert sum(d.startswith("2 heads") for d in details(after)) == 2
    if model != "phi3":  # there the keys are a part of one weight, and the rest of it moves
        assert "a kv head moves only with its whole group" in refusals(after)


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
