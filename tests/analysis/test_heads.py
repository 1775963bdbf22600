"""Heads are found by which rows and columns may change places, whatever the layout of a weight."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.analysis.heads import HeadAxis, head_axes
from tests.passes.equivalence.harness import canonical

# By a part of the weight's name: the axis and size of its heads (tests/tiny.py has the configs).
HEADS = {
    "bert": {"query": (0, 8), "key": (0, 8), "value": (0, 8), "attention.output.dense": (1, 8)},
    "llama": {"q_proj": (0, 8), "k_proj": (0, 8), "v_proj": (0, 8), "o_proj": (1, 8)},
    "gpt2": {"c_attn": (0, 8), "attn.c_proj": (1, 8)},  # queries, keys and values side by side
    "gptneox": {"query_key_value": (0, 8), "attention.dense": (1, 8)},  # head by head
}


@pytest.mark.parametrize("model", HEADS)
def test_heads_of_every_layout(model):
    program = canonical(model)
    found = head_axes(program)
    wanted = HEADS[model]
    assert found
    for name, heads in found.items():
        assert [HeadAxis(*wanted[part]) for part in wanted if part in name] == [heads]
    attention = [
        n for n in program.weights() if n.endswith("weight") and any(p in n for p in wanted)
    ]
    assert sorted(found) == sorted(n for n in attention if program.weight(n).dim() == 2)


def test_a_model_without_attention_has_none():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    assert head_axes(fxopt.capture(module, (torch.randn(2, 8),))) == {}
