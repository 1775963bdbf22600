"""Channels of the residual stream in another order."""

import pytest

from fxopt.passes.equivalence.permute_residual import PermuteResidual
from tests.passes.equivalence.harness import canonical, changed, refusals, run, sites


@pytest.mark.parametrize("model", ["llama", "tied-llama", "gpt2", "gptneox", "gemma3", "mixtral"])
def test_there_is_exactly_one_and_everything_follows(model):
    before = canonical(model)
    after = run(before, PermuteResidual(by="random"))
    assert len(sites(after)) == 1
    left = {n for n, v in before.weights().items() if n.endswith(".weight") and 32 in v.shape}
    assert left <= changed(before, after)


def test_an_output_refuses_it_and_one_index_allows_it():
    before = canonical("bert")
    after = run(before, PermuteResidual(by="random"))
    assert sites(after) == []
    assert "it is the model's output 'last_hidden_state'" in refusals(after)
    restored = run(before, PermuteResidual(by="random", restore_output=True))
    assert len(sites(restored)) == 1
    assert len(restored.nodes()) == len(before.nodes()) + 1
    twice = run(restored, PermuteResidual(by="random", seed=1, restore_output=True))
    assert len(sites(twice)) == 1
