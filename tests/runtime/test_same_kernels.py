"""A loaded model runs the kernels that were chosen when it was saved."""

import random

import pytest
import torch
from torch import nn

import fxopt
from fxopt.ir.text import format_program
from fxopt.lowering.gate import SpeedGate
from tests.models import randomize
from tests.zoo import BLOCKS

PLAIN = {
    name: BLOCKS[name]
    for name in ("pre_norm_layer", "post_norm_encoder", "multihead_bmm", "decoder_partial_rope")
}
PLAIN["norm_and_linear"] = (
    lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)),
    lambda: (torch.randn(2, 5, 32),),
)
DECISIONS = {
    "every": lambda key: True,
    "none": lambda key: False,
    "some": lambda key: random.Random(key).random() < 0.5,
}


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_decisions_of_plain_modules_are_found_again(name, decision, tmp_path, monkeypatch):
    """A size that capture knows under a symbol is a number in the folder."""

    def decide(gate, mini, leaves, rule, key, example):
        return DECISIONS[decision](key)

    monkeypatch.setattr(SpeedGate, "_time", decide)
    make, inputs = PLAIN[name]
    model = make().eval()
    randomize(model)
    optimized = fxopt.optimize(model, "w8a8-dynamic", inputs(), progress=False)
    optimized.save_pretrained(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert format_program(loaded.lowered) == format_program(optimized.lowered)
    wide = torch.randn(16, 64, 32)
    with torch.no_grad():
        assert torch.equal(loaded(wide), optimized(wide))
