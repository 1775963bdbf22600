"""Parametrized weights are computed once and stored under the name that the module has."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxopt

MAKERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "twice": lambda module: parametrizations.spectral_norm(parametrizations.weight_norm(module)),
}


class Parametrized(nn.Module):
    """A parametrized linear that is called twice, and one that is as it comes."""

    def __init__(self, make):
        super().__init__()
        self.inner, self.plain = make(nn.Linear(16, 16)), nn.Linear(16, 16)

    def forward(self, x):
        return self.plain(self.inner(torch.relu(self.inner(x))))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_parametrized_weight_is_stored_as_what_it_comes_to(kind, tmp_path):
    model, x = Parametrized(MAKERS[kind]).eval(), torch.randn(2, 5, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimized = fxopt.optimize(model, "canonical", (x,), progress=False)
    assert set(optimized.program.weights()) == {
        f"{linear}.{tensor}" for linear in ("inner", "plain") for tensor in ("weight", "bias")
    }
    with torch.no_grad():
        assert torch.equal(optimized.program.weight("inner.weight"), model.inner.weight)
        assert torch.equal(optimized(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimized.save_pretrained(tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(x), optimized(x))


def test_a_parametrized_linear_is_quantized():
    model = Parametrized(parametrizations.weight_norm).eval()
    optimized = fxopt.optimize(model, "w8a8-dynamic", (torch.randn(2, 5, 16),), progress=False)
    record = optimized.report.history[-1]
    assert {site.path for site in record.sites} == {"inner", "plain"}
    assert not record.refusals
