"""`compile: inductor`: torch.compile really runs, and what it runs is the lowered program."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import fxopt
from tests.models import optimize_zoo, zoo_model

RECIPE = {
    "passes": ["canonicalize", {"quantize": {"activations": {"granularity": "token"}}}],
    "lowering": {"speed_gate": False, "compile": "inductor"},
}


@pytest.fixture
def one_compiler(monkeypatch):
    """Inductor starts a pool of processes otherwise, which costs more than these two graphs."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_inductor_runs_the_kernels_and_what_lies_between(one_compiler, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Softplus(), nn.Linear(32, 16)).eval()
    optimized = fxopt.optimize(module, RECIPE, example_inputs=(torch.randn(3, 16),))
    assert not counters["stats"]  # nothing is compiled before the first call
    inputs = [torch.randn(5, 16), torch.randn(9, 16)]
    expected = [optimized.lowered.graph_module(x)[0] for x in inputs]
    result, [code] = run_and_get_code(optimized, inputs[0])
    assert torch.allclose(result, expected[0], rtol=1e-5, atol=1e-6)
    # Both linears stay kernels of fxopt; what lies between them is one loop in C++.
    assert code.count("= torch.ops.fxopt.dynamic_linear_w8a8.default(") == 2
    assert "softplus" in code
    assert torch.allclose(optimized(inputs[1]), expected[1], rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1  # another batch is the same graph
    assert counters["aot_autograd"]["ok"] == 1
    assert not counters["graph_break"]
    optimized.save_pretrained(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert torch.allclose(again(inputs[0]), expected[0], rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


def test_both_stages_of_an_encoder_decoder_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: Counted(module, compiled))
    recipe = {"passes": ["canonicalize"], "lowering": RECIPE["lowering"]}
    optimized = optimize_zoo("t5", recipe)
    ids = torch.randint(3, 99, (2, 6))
    tokens = optimized.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model = zoo_model("t5").model
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected)
    stages = optimized.stages
    assert [compiled.count(part.inner) for part in (stages.source, stages.step)] == [1, 4]


class Counted(nn.Module):
    """Stands where a compiled module would, and notes each call."""

    def __init__(self, inner: nn.Module, calls: list[nn.Module]) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *inputs):
        self.calls.append(self.inner)
        return self.inner(*inputs)
