"""Neurons of feed-forward blocks in another order."""

import pytest
import torch
from torch import nn

from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from tests.passes.equivalence.harness import (
    canonical,
    changed,
    idempotent,
    plain,
    refusals,
    run,
    sites,
)

WEIGHTS = {
    "llama": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    "gpt2": ("c_fc.weight", "c_fc.bias", "mlp.c_proj.weight"),
    "gptneox": ("4h.weight", "4h.bias", "4h_to_h.weight"),
    "phi3": ("gate_up_proj.weight", "down_proj.weight"),
    "bert": ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"),
    "mixtral": ("gate_up_proj", "down_proj"),
    "gemma3": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
}


@pytest.mark.parametrize("model", WEIGHTS)
def test_the_neurons_of_every_layer_move(model):
    before = canonical(model)
    after = run(before, PermuteFfn(by="random"))
    layers = 3 if model == "gemma3" else 2
    assert len(sites(after)) == layers
    names = changed(before, after)
    assert len(names) == layers * len(WEIGHTS[model])
    assert all(name.endswith(WEIGHTS[model]) for name in names)
    for name in names:  # numbers keep their values
        old, new = before.weight(name), after.weight(name)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_sorting_twice_is_sorting_once():
    idempotent(run(canonical("llama"), PermuteFfn()), PermuteFfn())


def test_an_output_keeps_its_order():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    before = plain(module, torch.randn(2, 3, 4))
    after = run(before, PermuteFfn(by="random"))
    assert sites(after) == []
    assert "it is the model's output" in refusals(after)
    assert changed(before, after) == set()
