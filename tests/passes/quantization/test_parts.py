"""Weights whose rows linears read apart: every pass that stores codes divides them first."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.analysis.execution import run
from fxopt.ir.program import Program
from fxopt.passes.quantization.parts import store_parts
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier

aten = torch.ops.aten


def memory(rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(2, 5, 32, generator=generator), torch.randn(2, rows, 32, generator=generator)


def decoder_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval()


def three_inputs() -> nn.Module:
    class ThreeInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.attention(x, y, y * 2, need_weights=False)[0]

    torch.manual_seed(0)
    return ThreeInputs().eval()


def canonical(model: nn.Module, *inputs: torch.Tensor) -> Program:
    captured = fxopt.capture(model, example_inputs=inputs)
    return Manager(Verifier([], mode="off")).run(captured, Recipe.resolve(["canonicalize"]).build())


def sliced(program: Program) -> list[str]:
    """The weights whose rows linears read apart."""
    return [
        str(node.args[1].args[0].target)  # type: ignore[union-attr]
        for node in program.nodes(aten.linear.default)
        if node.args[1].target is aten.slice.Tensor  # type: ignore[union-attr]
    ]


@pytest.mark.parametrize("make", [decoder_layer, three_inputs])
def test_parts_have_the_rows_they_had(make):
    model = make()
    program = canonical(model, *memory())
    names = sliced(program)
    assert names
    parts = program.clone()
    store_parts(parts, ("*",), (), "quantize")
    parts.graph_module.recompile()
    assert not sliced(parts)
    for inputs in (memory(), memory(1)):
        for a, e in zip(run(parts, inputs), run(program, inputs), strict=True):
            assert torch.equal(a, e)
    parts.remove_unused_weights()
    assert parts.byte_count() == program.byte_count()
    for name in set(names):
        held = [value for key, value in parts.weights().items() if key.startswith(f"{name}_")]
        assert torch.equal(torch.cat(held), program.weight(name))
    again = {**parts.weights()}
    store_parts(parts, ("*",), (), "quantize")
    assert parts.weights().keys() == again.keys()


def test_a_weight_is_divided_whole_or_not():
    program = canonical(three_inputs(), *memory())
    before = set(program.weights())
    store_parts(program, ("*",), ("attention",), "quantize")
    assert set(program.weights()) == before


def test_a_weight_that_is_also_read_whole_stays():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = nn.functional.linear(x, self.weight[:4])
            return first.sum() + nn.functional.linear(x, self.weight)

    program = canonical(Both(), torch.randn(3, 6))
    before = set(program.weights())
    store_parts(program, ("*",), (), "quantize")
    assert set(program.weights()) == before


GROUP = {"dtype": "int4", "granularity": "group", "group_size": 16}


@pytest.mark.parametrize(
    "chosen",
    [
        {"quantize": {"activations": {"granularity": "token"}}},
        {"quantize": {"activations": {"granularity": "tensor"}}},
        {"gptq": {"weights": GROUP}},
        {"gobo": {"bits": 4}},
        "llm-int8",
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [decoder_layer, three_inputs])
def test_every_projection_is_stored_as_codes(make, chosen):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimized = fxopt.optimize(
        model,
        {"passes": ["canonicalize", chosen]},
        example_inputs=memory(),
        calibration=[memory(rows) for rows in (3, 7, 9)],
    )
    record = optimized.report.history[-1]
    assert [refusal for refusal in record.refusals if "computed" in refusal.reason] == []
    assert not sliced(optimized.program)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        expected, found = model(*memory()), optimized(*memory())
    assert (found - expected).norm() < 0.3 * expected.norm()
