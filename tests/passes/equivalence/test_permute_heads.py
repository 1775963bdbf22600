"""Heads in another order: within the group of a kv head, and whole groups."""

import pytest
import torch

from fxopt.passes.equivalence.permute_heads import PermuteHeads
from tests.passes.equivalence.harness import canonical, changed, refusals, run, sites


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3"])
def test_grouped_queries_move_in_their_group_and_groups_move_whole(model):
    before = canonical(model)
    after = run(before, PermuteHeads(by="random"))
    details = [site.detail for site in after.history[-1].sites]
    assert sum(d.startswith("2 blocks of 2 heads") for d in details) == 2
    assert sum(d.startswith("2 heads") for d in details) == 2
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
    details = [site.detail for site in after.history[-1].sites]
    assert len(details) == 2
    assert all("relative_attention_bias.weight" in detail for detail in details)
    assert "a mask or bias belongs to the head" in refusals(after)
