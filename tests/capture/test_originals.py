"""What a capture does to the model it captures: nothing, whatever happens."""

import pytest
import torch
import transformers as hf
from torch import nn

from fxopt.capture import capture_program
from fxopt.errors import CaptureError
from tests.zoo import BASE


class Counting(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.in_place = in_place
        self.last = None

    def forward(self, x):
        mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.mean = self.mean.copy_(mean) if self.in_place else mean
        self.last = self.linear(x - self.mean)
        return self.last


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_and_attributes_are_put_back(in_place):
    model = Counting(in_place)
    mean = model.mean
    with pytest.raises(CaptureError):
        capture_program(model, (torch.randn(3, 4),))
    assert model.mean is mean
    assert not mean.any()
    assert model.last is None


def test_buffers_that_a_run_writes_to_are_named():
    with pytest.raises(CaptureError, match="writes to its buffers mean when it runs"):
        capture_program(Counting(True), (torch.randn(3, 4),))


def test_a_buffer_that_is_written_and_never_read_is_named():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x):
            self.calls[0].add_(1)
            return x * 2

    with pytest.raises(CaptureError, match="writes to its buffers calls when it runs"):
        capture_program(Counter(), (torch.randn(3, 4),))


def test_submodules_that_a_run_replaces_are_put_back():
    config = hf.BigBirdConfig(**{**BASE, "attention_type": "block_sparse", "block_size": 4})
    model = hf.BigBirdModel(config).eval()
    attentions = [layer.attention.self for layer in model.encoder.layer]
    capture_program(model)
    assert [layer.attention.self for layer in model.encoder.layer] == attentions
    assert model.attention_type == "block_sparse"


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(4))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_untouched(script):
    model = script(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match="Pass the module that it was made from"):
        capture_program(model, (torch.randn(2, 4),))
    assert model(torch.randn(2, 4)).shape == (2, 4)
