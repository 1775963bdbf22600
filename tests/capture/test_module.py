"""Plain modules: nested inputs, dynamic sizes, the fast path, and clear refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from fxopt.capture import capture_program
from fxopt.errors import CaptureError, InputError, ModelError
from fxopt.ir.structure import unflatten
from fxopt.runtime.calling import bind_structured


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair: Any, *, extra: Any, scale: float = 2.0) -> Any:
        left, right = pair
        return {"sum": self.linear(left) + right["r"], "rest": (extra[0] * scale, None)}


def test_nested_positional_and_keyword_inputs():
    example = ((torch.randn(3, 4), {"r": torch.randn(3, 4)}),)
    program = capture_program(
        Nested(), {"pair": example[0], "extra": [torch.randn(3, 2)], "scale": 3.0}
    )
    assert [spec.name for spec in program.signature.inputs] == ["pair_0", "pair_1_r", "extra_0"]
    assert [spec.name for spec in program.signature.outputs] == ["sum", "rest.0"]
    assert program.signature.inputs[0].shape == ("batch", 4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_are_captured_operator_by_operator(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    program = capture_program(encoder, (torch.randn(2, 5, 32),))
    targets = {str(node.target) for node in program.nodes()}
    assert "aten._transformer_encoder_layer_fwd.default" not in targets
    assert "aten.linear.default" in targets
    assert program.signature.inputs[0].shape == ("batch", "dim1", 32)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_encoder_with_padding_is_captured_as_it_is_made_by_default():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    example = {"src": torch.randn(2, 5, 32), "src_key_padding_mask": padding}
    program = capture_program(nn.TransformerEncoder(layer, 2), example)
    assert [spec.shape for spec in program.signature.inputs] == [
        ("batch", "dim1", 32),
        ("batch", "dim1"),
    ]


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def random_mask(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.rand(length, length, generator=generator) < 0.4
    return hidden & ~torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("made", [causal, random_mask])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_a_mask_is_taken_as_given(kind, made):
    """torch compares it with a causal mask, which is a branch on its values."""
    torch.manual_seed(0)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    elif kind == "decoder":
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerDecoder(layer, 1).eval()
    else:
        model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()

    def inputs(length: int) -> dict[str, Tensor]:
        x = torch.randn(2, length, 32)
        if kind == "encoder":
            return {"src": x, "mask": made(length)}
        other = {"memory" if kind == "decoder" else "src": torch.randn(2, length + 1, 32)}
        return {"tgt": x, **other, "tgt_mask": made(length)}

    detect = transformer._detect_is_causal_mask
    program = capture_program(model, inputs(6))
    assert transformer._detect_is_causal_mask is detect
    for length in (6, 9):
        example = inputs(length)
        with torch.no_grad():
            (result,) = program.graph_module(*bind_structured(program.signature, (), example))
            torch.testing.assert_close(result, model(**example))


def test_multihead_attention_with_and_without_weights():
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    example = {"query": x, "key": x, "value": x, "need_weights": False}
    assert len(capture_program(attention, example).signature.outputs) == 1
    assert len(capture_program(attention, (x, x.clone(), x.clone())).signature.outputs) == 2


def test_a_batch_of_one_does_not_fix_the_batch():
    program = capture_program(nn.Linear(4, 3), (torch.randn(1, 4),))
    assert program.signature.inputs[0].shape == ("batch", 4)
    assert program.graph_module(torch.randn(7, 4))[0].shape == (7, 3)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((2, 5, 4), (1, 5, 4)), [("batch", "dim1", "dim2"), (1, "dim1", "dim2")]),
        (((1, 5, 4), (1, 5, 4)), [("batch", "dim1", "dim2"), ("batch", "dim1", "dim2")]),
        (((2, 5, 4), (1, 1, 4)), [("batch", "dim1", "dim2"), (1, 1, "dim2")]),
        (((3, 4), (1,)), [("batch", "dim1"), (1,)]),
    ],
)
def test_an_input_that_is_broadcast_in_the_example_stays_so(shapes, expected):
    class Add(nn.Module):
        def forward(self, x, position):
            return x + position

    example = tuple(torch.randn(shape) for shape in shapes)
    program = capture_program(Add(), example)
    assert [spec.shape for spec in program.signature.inputs] == expected
    program.signature.check(list(example))
    assert torch.equal(program.graph_module(*example)[0], example[0] + example[1])


def test_shared_weights_are_held_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    program = capture_program(Shared(), (torch.randn(2, 4),))
    assert sorted(program.weights()) == ["first.bias", "first.weight"]
    assert program.aliases["second.weight"] == "first.weight"


def test_no_example_inputs():
    with pytest.raises(InputError, match="plain module: fxopt cannot know"):
        capture_program(nn.Linear(2, 2))


@pytest.mark.parametrize("example", [(torch.randn(3, 7),), {"y": torch.randn(3, 4)}])
def test_example_inputs_that_do_not_fit(example):
    with pytest.raises(InputError, match="Linear fails on its example_inputs"):
        capture_program(nn.Linear(4, 4), example)


def test_example_inputs_of_the_wrong_kind():
    with pytest.raises(InputError, match="example_inputs is a str"):
        capture_program(nn.Linear(4, 4), "x")
    with pytest.raises(InputError, match="hold no tensor"):
        capture_program(nn.Linear(4, 4), ())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_data_dependent_control_flow():
    module = Branching().train()
    with pytest.raises(CaptureError, match="branches on the values.* torch.where or a mask"):
        capture_program(module, (torch.randn(2, 4),))
    assert module.training
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_programs_are_compared_on_rows_that_differ(fill):
    class Score(nn.Module):
        def forward(self, x, y, mask):
            return (x @ y.mT).masked_fill(mask[:, None], 0)

    mask = torch.tensor([[True, False, False, False]])
    program = capture_program(Score(), (fill(1, 3, 8), fill(1, 4, 8), mask))
    x, y, hidden = program.examples[1]
    assert len({*x.shape[:2], y.shape[1]}) == 3
    assert len(x.flatten(0, 1).unique(dim=0)) == x.shape[0] * x.shape[1]
    assert 0.5 < float(x.square().mean().sqrt()) < 2
    assert bool((x >= 0).all()) is (fill is torch.ones)
    assert len(hidden.unique(dim=0)) > 1
    assert not hidden.all(-1).any()


def test_shuffled_integers_stay_those_of_the_example():
    class Look(nn.Module):
        def forward(self, index):
            return torch.arange(100.0)[index]

    program = capture_program(Look(), (torch.tensor([[97, 5, 42]]),))
    assert all(set(index.unique().tolist()) <= {97, 5, 42} for [index] in program.examples)
    assert len(program.examples[1][0].unique(dim=0)) > 1


def test_a_hook_that_changes_the_result_is_refused():
    module = nn.Sequential(nn.Linear(4, 4))
    module.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(CaptureError, match="forward hook on Sequential itself"):
        capture_program(module, (torch.randn(2, 4),))


def test_an_operator_of_higher_order_is_named():
    class Cond(Branching):
        def forward(self, x):
            return torch.cond(x.sum() > 0, self.linear, torch.clone, (x,))

    with pytest.raises(CaptureError, match="calls cond .*ordinary operators"):
        capture_program(Cond(), (torch.randn(2, 4),))


def test_unknown_containers_are_refused():
    class Strange(nn.Module):
        def forward(self, x):
            return {1, 2}

    with pytest.raises(CaptureError, match="the module's result is a set"):
        capture_program(Strange(), (torch.randn(2, 2),))


def test_non_contiguous_examples_and_odd_sizes():
    example = torch.randn(5, 4, 3).transpose(0, 2)
    program = capture_program(nn.Linear(5, 2), (example,))
    assert program.signature.inputs[0].shape == ("batch", "dim1", 5)


def test_an_in_place_edit_whose_result_is_not_used_is_kept():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.sin()
            y[:, 1:].add_(1)
            return y * 2

    module = InPlace()
    x = torch.randn(3, 4)
    program = capture_program(module, (x,))
    assert torch.equal(program.graph_module(x)[0], module(x))
    assert any("add_" in str(node.target) for node in program.nodes())


def test_named_tuples_and_dicts_in_another_order_are_taken_as_captured():
    class Pick(nn.Module):
        def forward(self, batch):
            return torch.max(batch["x"] - batch["inner"]["y"], -1)

    x, y = torch.randn(2, 2, 4)
    program = capture_program(Pick(), ({"x": x, "inner": {"z": x, "y": y}},))
    tensors = bind_structured(program.signature, ({"inner": {"y": y, "z": x}, "x": x},), {})
    result = unflatten(program.signature.output_structure, program.graph_module(*tensors))
    assert torch.equal(result.indices, torch.max(x - y, -1).indices)


@pytest.mark.parametrize("example", [torch.randn(3), torch.full((3,), torch.nan + 0j)])
def test_complex_nan_is_refused(example):
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            value = torch.full((3,), 1j if example.is_complex() else torch.nan * 1j)
            self.turn = nn.Parameter(value)

        def forward(self, x):
            return torch.view_as_real(x * self.turn)

    with pytest.raises((ModelError, InputError), match="NaN"):
        capture_program(Turn(), (example,))
