"""OptimizedModel around plain modules: same call, same nesting, clear refusals."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import InputError, LoweringError

RECIPE = {"passes": ["canonicalize"], "lowering": {"speed_gate": False}}


def test_a_plain_module_keeps_its_call():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    optimized = fxopt.optimize(encoder, RECIPE, example_inputs=(torch.randn(2, 5, 32),))
    for shape in ((1, 1, 32), (3, 9, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = encoder(x)
        assert torch.allclose(optimized(x), expected, atol=1e-5)
        assert torch.allclose(optimized(src=x), expected, atol=1e-5)


def test_nested_calls_and_their_errors():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair, factor=2):
            return {"a": self.linear(pair[0]) * factor, "b": [pair[1]]}

    module = Pair()
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    optimized = fxopt.optimize(module, RECIPE, example_inputs=((x, y),))
    result = optimized((x, y))
    assert torch.allclose(result["a"], module((x, y))["a"], atol=1e-6)
    assert torch.equal(result["b"][0], y)
    with pytest.raises(InputError, match="does not fit the captured signature"):
        optimized(x, y)
    with pytest.raises(InputError, match="does not fit"):
        optimized((x, y), factor=3)
    with pytest.raises(InputError, match="dimension 1 of input .* is 5"):
        optimized((torch.randn(3, 5), y))
    with pytest.raises(InputError, match="torch.int64; the program takes torch.float32"):
        optimized((x, torch.ones(3, 2).long()))


def test_an_unusable_result_type_is_refused_before_anything_happens():
    class Odd(list):
        pass

    class Module(nn.Module):
        def forward(self, x):
            return Odd([x])

    with pytest.raises(fxopt.FxoptError, match="Odd"):
        fxopt.optimize(Module(), RECIPE, example_inputs=(torch.randn(2, 2),))


def test_reading_an_optimized_model(capsys):
    module = nn.Linear(4, 3)
    optimized = fxopt.optimize(module, RECIPE, example_inputs=(torch.randn(2, 4),))
    optimized.print_graph()
    assert "aten.linear.default" in capsys.readouterr().out
    assert optimized.graph is optimized.program.graph
    assert optimized.graph_module is optimized.program.graph_module
    assert optimized.byte_count() == 15 * 4
    assert "inputs=(" in repr(optimized)
    assert sorted(optimized.state_dict()) == ["bias", "weight"]


def test_a_module_that_holds_an_optimized_model_has_its_state():
    def parent() -> nn.Module:
        body = fxopt.optimize(nn.Linear(4, 3), RECIPE, example_inputs=(torch.randn(2, 4),))
        return nn.ModuleDict({"body": body, "head": nn.Linear(3, 2)})

    first, second = parent(), parent()
    state = first.state_dict()
    assert sorted(state) == ["body.bias", "body.weight", "head.bias", "head.weight"]
    assert not any(value.requires_grad for value in state.values())
    assert sorted(first["body"].state_dict(prefix="x.")) == ["x.bias", "x.weight"]
    with pytest.raises(LoweringError, match="does not load another state dict"):
        second.load_state_dict(state)
    head = {name: value for name, value in state.items() if name.startswith("head")}
    missing = second.load_state_dict(head, strict=False).missing_keys
    assert sorted(missing) == ["body.bias", "body.weight"]
    assert torch.equal(second["head"].weight, first["head"].weight)


def test_inplace_frees_the_model():
    module = nn.Linear(64, 64)
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = module(x)
    optimized = fxopt.optimize(module, RECIPE, example_inputs=(x,), inplace=True)
    assert torch.equal(optimized(x), expected)
    assert all(parameter.numel() == 0 for parameter in module.parameters())


def test_arguments_that_were_not_captured_are_not_dropped():
    class Masked(nn.Module):
        def forward(self, x, mask=None):
            return x if mask is None else x * mask

    x = torch.randn(2, 3)
    optimized = fxopt.optimize(Masked(), RECIPE, example_inputs={"x": x})
    assert torch.equal(optimized(x), x)
    with pytest.raises(InputError, match="does not fit"):
        optimized(x=x, mask=torch.zeros(2, 3))
    with pytest.raises(InputError, match="does not fit"):
        optimized(x=x, msak=torch.zeros(2, 3))
