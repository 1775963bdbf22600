"""Sizes at which a graph is the model: found at capture, held at every call, stored."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fxopt
from fxopt.capture import capture_program
from fxopt.capture.pretrained import capture_pretrained
from fxopt.errors import CaptureError, InputError
from fxopt.ir.signature import Signature, SizeRange
from fxopt.pipeline.data import calibration_samples
from tests.models import zoo_model
from tests.zoo import BASE


class Sized(nn.Module):
    """Branches or loops over its length, which export fixes to what the example takes."""

    def __init__(self, branch: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.branch = branch

    def forward(self, x):
        return self.linear(x) * self.branch(x.shape[1])


def long(length):
    return 2 if length > 64 else 1


@pytest.mark.parametrize(
    ("branch", "example", "expected", "inside", "outside"),
    [
        (long, 16, SizeRange(0, 64), [1, 64], [65, 200]),
        (long, 100, SizeRange(65, None), [65, 500], [1, 64]),
        (lambda n: 3 - (n < 300), 200, SizeRange(0, 299), [1, 299], [300]),
        (lambda n: len(range((n + 63) // 64)), 16, SizeRange(0, 64), [1, 64], [65]),
    ],
)
def test_a_branch_over_the_length_is_the_end_of_the_range(
    branch, example, expected, inside, outside
):
    model = Sized(branch)
    optimized = fxopt.optimize(
        model, "canonical", (torch.randn(2, example, 8),), target="reference", progress=False
    )
    assert dict(optimized.signature.ranges) == {"dim1": expected}
    for length in inside:
        x = torch.randn(3, length, 8)
        assert torch.allclose(optimized(x), model(x), atol=1e-6)
    for length in outside:
        with pytest.raises(InputError, match=f"dim1 is {length}; .*example_inputs of that size"):
            optimized(torch.randn(3, length, 8))


def test_the_range_is_stored_and_older_folders_have_none():
    program = capture_program(Sized(long), (torch.randn(2, 16, 8),))
    stored = program.signature.to_dict()
    assert Signature.from_dict(stored) == program.signature
    del stored["ranges"]
    assert Signature.from_dict(stored).accepts([torch.randn(2, 65, 8)])


@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "bert", "vit", "t5", "mixtral"])
def test_ordinary_models_take_any_size(name):
    assert dict(zoo_model(name).program.signature.ranges) == {}


@pytest.mark.parametrize("example", [1, 2, 16])
def test_a_size_that_only_the_export_asks_about_is_no_limit(example):
    convolution = nn.Conv1d(8, 8, 3)
    program = capture_program(convolution, (torch.randn(example, 8, 3 * example),))
    x = torch.randn(1, 8, 3)
    program.signature.check([x])
    assert torch.allclose(program.graph_module(x)[0], convolution(x), atol=1e-6)


def test_a_table_limits_the_sum_of_past_and_new_tokens_and_nothing_else():
    assert dict(zoo_model("gptneo").program.signature.ranges) == {
        "past + sequence": SizeRange(0, 128)
    }


class LongBert(hf.BertModel):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        result = super().forward(input_ids, attention_mask, **kwargs)
        if input_ids.shape[1] > 20:
            result.last_hidden_state = result.last_hidden_state * 2
        return result


def test_texts_are_cut_to_what_the_program_takes():
    signature = capture_program(LongBert(hf.BertConfig(**BASE)).eval()).signature
    assert dict(signature.ranges) == {"sequence": SizeRange(0, 20)}

    class Tokenizer:
        pad_token = "."

        def __call__(self, texts, max_length, **_):
            return {"input_ids": torch.ones(len(texts), max_length, dtype=torch.long)}

    (sample,) = calibration_samples(signature, ["text"], Tokenizer(), 1, 64, 1)
    assert sample.inputs[0].shape == (1, 20)


def test_the_check_goes_well_past_the_example():
    class Hidden(hf.BertModel):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            result = super().forward(input_ids, attention_mask, **kwargs)
            length: Any = input_ids.shape[1]
            if isinstance(length, int) and length == 40:  # a tracer's sizes are no integers
                result.last_hidden_state = result.last_hidden_state * 2
            return result

    with pytest.raises(CaptureError, match="check at batch 1, length 40.* differs"):
        capture_pretrained(Hidden(hf.BertConfig(**BASE)).eval(), None)
