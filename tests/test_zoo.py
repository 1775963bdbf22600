"""Every architecture of the zoo: `canonical` keeps its results, `w8a8-dynamic` runs on it."""

from pathlib import Path

import pytest
import torch
import transformers as hf

import fxopt
from fxopt.ir.program import PassRecord, Program
from fxopt.runtime.folder import read_folder
from tests.models import canonical_program, optimize_zoo, zoo_model
from tests.tiny import save

aten = torch.ops.aten
ops = torch.ops.fxopt
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
    "gptneox",
    "t5",
    "bart",
    "m2m100",
    "whisper",
    "mixtral",
    "granitemoe",
    "llama4",
    "gptj",
    "falcon",
]
ENCODERS = [
    "bert",
    "roberta",
    "distilbert",
    "vit",
    "clip",
    "modernbert",
    "deberta",
    pytest.param(
        "debertav1",
        marks=pytest.mark.skipif(
            torch.__version__.startswith(("2.11.", "2.12.")),
            reason="torch 2.11 cannot export a slice at a place that depends on values",
        ),
    ),
]
WEIGHTS = {aten.linear.default: (1,), aten.embedding.default: (0,), ops.moe.default: (3, 4)}
MODES = {"cache": {}, "beams": {"num_beams": 3}, "no cache": {"use_cache": False}}


def recipe(name: str) -> dict:
    """A preset with the speed gate off: on models this small it would keep everything floating."""
    return {**fxopt.Recipe.resolve(name).to_dict(), "lowering": {"speed_gate": False}}


# Scoped to the module so that the tests of one model follow each other and share its capture.
@pytest.fixture(scope="module", params=GENERATIVE)
def generative(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def prompts(model) -> list[dict]:
    """One row, and two of which the first is padded on the left."""
    if model.main_input_name == "input_features":
        return [{"input_features": torch.randn(rows, 8, 60)} for rows in (1, 2)]
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return [
        {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
        {"input_ids": ids, "attention_mask": mask},
    ]


def test_generation_is_that_of_the_model(generative):
    model = zoo_model(generative).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = optimize_zoo(generative, recipe("canonical"))
    for inputs in prompts(model):
        for label, mode in MODES.items():
            options = {"max_new_tokens": 10, "do_sample": False, **mode}
            expected = hf.GenerationMixin.generate(model, **inputs, **options)
            assert torch.equal(optimized.generate(**inputs, **options), expected), label
    torch.manual_seed(1)
    expected = hf.GenerationMixin.generate(model, **inputs, max_new_tokens=8, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(optimized.generate(**inputs, max_new_tokens=8, do_sample=True), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_w8a8_dynamic_generates(generative):
    optimized = optimize_zoo(generative, recipe("w8a8-dynamic"))
    assert_stored_as_integers(optimized.program)
    inputs = prompts(zoo_model(generative).model)[1]
    tokens = optimized.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 2


def test_outputs_are_those_of_the_model(encoder):
    model = zoo_model(encoder).model
    optimized = optimize_zoo(encoder, recipe("canonical"))
    names = {spec.name for spec in optimized.signature.inputs}
    inputs = {}
    if "pixel_values" in names:
        inputs["pixel_values"] = torch.randn(3, 3, 32, 32)
    if "input_ids" in names:
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


def test_w8a8_dynamic_keeps_outputs_close(encoder):
    record = assert_stored_as_integers(optimize_zoo(encoder, recipe("w8a8-dynamic")).program)
    assert record.verification["sqnr_db"] > 15


def test_captures_of_decoders_can_be_saved(generative, tmp_path):
    assert_saved(generative, tmp_path)


def test_captures_of_encoders_can_be_saved(encoder, tmp_path):
    assert_saved(encoder, tmp_path)


def assert_saved(name: str, path: Path) -> None:
    """All that the capture and the canonical program call is on the list of what a folder may."""
    for program in (zoo_model(name).program, canonical_program(name)):
        save(path / "model", program)
        again = read_folder(path / "model", shapes=False).program
        assert [n.target for n in again.graph.nodes] == [n.target for n in program.graph.nodes]


def assert_stored_as_integers(program: Program) -> PassRecord:
    """Each linear, table and expert is a site and held as int8; bytes fell by just that."""
    record = program.history[-1]
    assert record.name == "quantize"
    saved, stored, quantized = 0, set(), set()
    for node in program.nodes(*WEIGHTS):
        for weight in (node.args[index] for index in WEIGHTS[node.target]):
            assert weight.target is ops.dequantize.default, node.name
            quantized.add(node.name)
            integers, scale = (program.constant(part) for part in weight.args[:2])
            assert integers.dtype == torch.int8
            if weight.args[0].target not in stored:
                stored.add(weight.args[0].target)
                saved += 3 * integers.numel() - scale.nbytes
    assert quantized == {site.node for site in record.sites}
    assert program.byte_count() == record.bytes_before - saved
    return record
