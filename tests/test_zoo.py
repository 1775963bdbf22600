"""Every architecture of the zoo: `canonical` keeps its results, `w8a8-dynamic` runs on it."""

import pytest
import torch
import transformers as hf

import fxopt
from tests.zoo import ZOO

GENERATIVE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gemma2",
    "phi3",
    "gpt2",
    "opt",
    "bloom",
    "gpt_neox",
    "t5",
    "bart",
    "whisper",
    "mixtral",
    "gptj",
    "falcon",
]
ENCODERS = ["bert", "roberta", "distilbert", "vit", "clip", "modernbert", "deberta"]
FAST = {"lowering": {"speed_gate": False}}


def recipe(name: str) -> dict:
    """A preset with the speed gate off: on models this small it would keep everything floating."""
    return {**fxopt.Recipe.resolve(name).to_dict(), **FAST}


def model_of(name: str):
    torch.manual_seed(0)
    return ZOO[name]().eval()


def prompt(model) -> dict:
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 60)}
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_is_that_of_the_model(name):
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = fxopt.optimize(model, recipe("canonical"), verify="fast")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    inputs = prompt(model)
    for mode in ({}, {"num_beams": 3}, {"use_cache": False}):
        options = {"max_new_tokens": 10, "do_sample": False, **mode}
        expected = hf.GenerationMixin.generate(model, **inputs, **options)
        assert torch.equal(optimized.generate(**inputs, **options), expected), mode
    torch.manual_seed(1)
    expected = hf.GenerationMixin.generate(model, **inputs, max_new_tokens=8, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(optimized.generate(**inputs, max_new_tokens=8, do_sample=True), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_are_those_of_the_model(name):
    model = model_of(name)
    optimized = fxopt.optimize(model, recipe("canonical"), verify="fast")
    inputs = {}
    if "pixel_values" in {spec.name for spec in optimized.signature.inputs}:
        inputs["pixel_values"] = torch.randn(3, 3, 32, 32)
    if "input_ids" in {spec.name for spec in optimized.signature.inputs}:
        inputs["input_ids"] = torch.randint(3, 99, (3, 9))
    with torch.no_grad():
        expected = model(**inputs)
    result = optimized(**inputs)
    assert type(result) is type(expected)
    assert list(result.keys()) == list(expected.keys())
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            scale = value.square().mean().sqrt()
            assert float((result[key] - value).abs().max() / scale) < 2e-5, key


@pytest.mark.parametrize("name", GENERATIVE + ENCODERS)
def test_w8a8_dynamic_runs(name):
    model = model_of(name)
    optimized = fxopt.optimize(model, recipe("w8a8-dynamic"), verify="fast")
    record = optimized.program.history[-1]
    assert record.name == "quantize"
    assert len(record.sites) >= 4
    assert optimized.program.byte_count() < 0.6 * record.bytes_before
    if name in GENERATIVE:
        inputs = prompt(model)
        tokens = optimized.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert tokens.shape[0] == 2
    else:
        assert record.verification["sqnr_db"] > 15
