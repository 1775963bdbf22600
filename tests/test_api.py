"""The public verbs on tiny models: recipes, bad input, progress, saving, reports."""

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.analysis.execution import run
from fxopt.errors import (
    CalibrationError,
    CaptureError,
    ExpectationError,
    FxoptError,
    InputError,
    LoweringError,
    ModelError,
    PassError,
    QualityFloorError,
    RecipeError,
)
from fxopt.ir.program import Level
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.quantization.quantize import ActivationOptions, Quantize
from fxopt.pipeline.lazy_samples import LazySamples
from fxopt.pipeline.recipe import Recipe
from tests.models import canonical_program, zoo_model

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
UNTIMED = {"lowering": {"speed_gate": False}}
CANONICAL = {"passes": ["canonicalize"], **UNTIMED}
DYNAMIC = {
    "name": "dynamic",
    "passes": ["canonicalize", {"quantize": {"activations": {"granularity": "token"}}}],
    **UNTIMED,
}
STATIC = {
    "passes": ["canonicalize", {"quantize": {"activations": {"granularity": "tensor"}}}],
    **UNTIMED,
}


class Mlp(nn.Module):
    """A plain module that captures in no time."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, scale=None):
        y = self.down(nn.functional.gelu(self.up(x)))
        return {"y": y if scale is None else y * scale, "norm": y.norm(dim=-1)}


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def example() -> tuple:
    return (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)),)


def hf_model(name: str):
    return zoo_model(name).model


def optimize(model, recipe, **options):
    return fxopt.optimize(model, recipe, **{"progress": False, **options})


@cache
def optimized_mlp():
    return optimize(mlp(), DYNAMIC, example_inputs=example())


# --- recipes --------------------------------------------------------------------------------


def test_every_form_of_a_recipe_means_the_same(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.resolve(DYNAMIC).to_yaml())
    passes = [Canonicalize(), Quantize(activations=ActivationOptions())]
    x = example()
    expected = optimized_mlp()(*x)["y"]
    assert Recipe.resolve(str(path)) == Recipe.resolve(path) == Recipe.resolve(DYNAMIC)
    optimized = optimize(mlp(), str(path), example_inputs=x, verify="off")
    assert torch.equal(optimized(*x)["y"], expected)
    # A list has the default lowering, whose gate may keep a layer floating.
    optimized = optimize(mlp(), passes, example_inputs=x, target="reference", verify="off")
    assert Recipe.resolve(passes).build() == Recipe.resolve(DYNAMIC).build() == passes
    assert len(optimized.report.history[-1].sites) == 2
    assert torch.allclose(optimized(*x)["y"], expected, atol=1e-5)


def test_a_preset_by_name():
    optimized = optimize(mlp(), "w8a16", example_inputs=example(), target="reference")
    assert optimized.recipe["name"] == "w8a16"
    assert [record.name for record in optimized.report.history] == ["canonicalize", "quantize"]
    integers = [t for t in optimized.program.weights().values() if t.dtype == torch.int8]
    assert len(integers) == 2


def test_the_result_is_that_of_the_model():
    model, x = mlp(), example()[0]
    optimized = optimize(model, CANONICAL, example_inputs=(x,))
    with torch.no_grad():
        expected = model(x)
    result = optimized(x=x)
    assert list(result) == ["y", "norm"]
    assert all(torch.allclose(result[key], expected[key], atol=1e-6) for key in expected)
    other = torch.randn(5, 1, 16)
    assert torch.allclose(optimized(other)["y"], model(other)["y"], atol=1e-6)


def test_threads_wait_for_each_other():
    wanted = [hf_model(name)(torch.arange(5)[None])[0] for name in ("llama", "bert")]

    def result(name: str) -> torch.Tensor:
        return optimize(hf_model(name), CANONICAL)(torch.arange(5)[None])[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(result, ("llama", "bert") * 2))
    for got, expected in zip(found, wanted * 2, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_keyword_examples():
    x = example()[0]
    inputs = {"x": x, "scale": torch.full((16,), 2.0)}
    optimized = optimize(mlp(), CANONICAL, example_inputs=inputs)
    assert torch.allclose(optimized(**inputs)["y"], 2 * mlp()(x)["y"], atol=1e-5)
    with pytest.raises(InputError, match="does not fit the captured signature"):
        optimized(x)


# --- bad input ------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    training = [module.training for module in model.modules()]
    config = getattr(model, "config", None)
    return {
        "state": state,
        "rest": (pointers, hooks, attributes, training, config and config.to_dict()),
        "attention": getattr(config, "_attn_implementation", None),
    }


def assert_untouched(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for name, value in before["state"].items():
        assert torch.equal(
            torch.nan_to_num(value.float(), 7.0),
            torch.nan_to_num(after["state"][name].float(), 7.0),
        )
    assert before["state"].keys() == after["state"].keys()
    assert before["rest"] == after["rest"]
    assert before["attention"] == after["attention"]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Call optimize, expect an error, and find model and disk as they were."""
    monkeypatch.chdir(tmp_path)

    def call(model, recipe, error, match, **options):
        before = snapshot(model)
        with pytest.raises(error, match=match) as caught:
            optimize(model, recipe, **options)
        assert isinstance(caught.value, FxoptError)
        assert_untouched(model, before)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    return call


def test_a_plain_module_needs_example_inputs(refused):
    refused(mlp(), CANONICAL, InputError, r"Mlp is a plain module.*example_inputs=\(x, \.\.\.\)")


@pytest.mark.parametrize("inputs", [(), {}, (3,)], ids=str)
def test_examples_without_a_tensor(refused, inputs):
    refused(mlp(), CANONICAL, InputError, "hold no tensor.*example_inputs", example_inputs=inputs)


def test_examples_that_the_module_does_not_take(refused):
    wrong = (torch.randn(2, 3, 17),)
    refused(mlp(), CANONICAL, InputError, "Mlp", example_inputs=wrong)


class Branching(nn.Module):
    """Goes another way for other values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return x - 1


def test_data_dependent_control_flow(refused, capfd):
    module, first = Branching().eval(), inspect.getsourcelines(Branching.forward)[1]
    message = refused(
        module, CANONICAL, CaptureError, "torch.where or a mask", example_inputs=example()
    )
    assert f"(in forward, line {first + 1})" in message
    assert capfd.readouterr().err == ""  # not the graph that torch.export had so far


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ("w8a8-dynamc", "no preset called 'w8a8-dynamc'.*Did you mean 'w8a8-dynamic'"),
        ("nowhere/mine.yaml", "no recipe file 'nowhere/mine.yaml'"),
        ({"passes": ["canonicalise"]}, "no pass called 'canonicalise'.*mean 'canonicalize'"),
        ({"pases": ["canonicalize"]}, "pases: unknown key. Did you mean 'passes'"),
        ({"passes": ["canonicalize"], "lowering": {"sped_gate": 1}}, "Did you mean 'speed_gate'"),
        ({"passes": [{"quantize": {"activation": {}}}]}, "Did you mean 'activations'"),
        ({"passes": ["quantize", "canonicalize"]}, "canonicalize.*before|after.*canonicalize"),
        ({"passes": []}, "name at least one pass"),
        ({"passes": ["canonicalize"], "fxopt": 99}, "newer than this fxopt.*pip install -U"),
        (42, "a recipe is a preset's name, a path"),
        (None, "a recipe is a preset's name, a path"),
    ],
    ids=str,
)
def test_wrong_recipes_are_refused_before_any_work(refused, monkeypatch, recipe, match):
    def capture(*_):
        raise AssertionError("capture was reached")

    monkeypatch.setattr("fxopt.api.capture_program", capture)
    refused(mlp(), recipe, RecipeError, f"(?s){match}", example_inputs=example())


def test_missing_calibration(refused):
    match = r"'quantize' needs calibration data.*Pass calibration=\[\.\.\.\]"
    refused(mlp(), STATIC, CalibrationError, match, example_inputs=example())
    refused(hf_model("bert"), STATIC, CalibrationError, match)


@pytest.mark.parametrize(
    ("calibration", "error", "match"),
    [
        ([], CalibrationError, "calibration"),
        (5, CalibrationError, "calibration is a int; pass a list"),
        (["some text"], CalibrationError, r"no tokenizer.*tokenizer\(text"),
        ([(torch.full((2, 3, 16), torch.nan),)], CalibrationError, "NaN or infinity"),
        ([{"y": torch.randn(2, 3, 16)}], InputError, "does not fit the captured signature"),
        ([(torch.randn(2, 3, 17),)], FxoptError, "16"),
    ],
    ids=["empty", "number", "text", "nan", "name", "shape"],
)
def test_calibration_that_cannot_be_used(refused, calibration, error, match):
    refused(mlp(), STATIC, error, match, example_inputs=example(), calibration=calibration)


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC, "w4a16-gptq"])
@pytest.mark.parametrize("wrong", ["vocabulary", "length"])
def test_calibration_that_the_model_cannot_run(refused, recipe, wrong):
    ids = torch.randint(0, 90, (2, 8))
    batch = {"input_ids": ids + 10_000 if wrong == "vocabulary" else ids.repeat(1, 400)}
    match = r"inputs of shapes \[\[2, \d+\].*does not run through the model.*vocabulary"
    refused(hf_model("bert"), recipe, CalibrationError, match, calibration=[batch])


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinite")])
def test_broken_weights(refused, value, word):
    model = mlp()
    with torch.no_grad():
        model.up.weight[3, 4] = value
    match = rf"'up.weight' \[32, 16\].*holds {word} values.*checkpoint is damaged"
    refused(model, CANONICAL, ModelError, match, example_inputs=example())


def test_a_buffer_may_be_infinite_and_not_nan(refused):
    model = mlp()
    model.register_buffer("limit", torch.tensor([torch.nan]))
    match = r"buffer 'limit' \[1\].*holds NaN.*checkpoint is damaged"
    refused(model, CANONICAL, ModelError, match, example_inputs=example())
    model.limit.fill_(torch.inf)
    fxopt.capture(model, example())


def test_nan_in_an_example(refused):
    match = r"input 'arg0' \[2, 3, 16\] holds NaN.*Pass inputs like those"
    inputs = (torch.full((2, 3, 16), torch.nan),)
    refused(mlp(), CANONICAL, InputError, match, example_inputs=inputs)


def test_weights_without_values(tmp_path):
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(ModelError, match="meta device.*Load the checkpoint"):
        optimize(model, CANONICAL, example_inputs=example())


def test_something_that_is_no_model():
    with pytest.raises(ModelError, match="asked to optimize a str"):
        optimize("bert", CANONICAL)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_a_pass_that_fails_in_the_middle(refused, monkeypatch, name):
    """It has already spoilt its copy when it fails; nothing of that is seen."""

    def fail(self, program, context):
        linear = program.nodes(aten.linear.default)[0]
        weight = str(linear.args[1].target)
        program.set_weight(weight, torch.zeros_like(program.weight(weight)))
        linear.replace_all_uses_with(linear.args[0])
        raise ZeroDivisionError("half way")

    monkeypatch.setattr(Quantize, "run", fail)
    model, options = (mlp(), {"example_inputs": example()})
    if name == "bert":
        model, options = hf_model("bert"), {}
    match = r"'quantize' failed with ZeroDivisionError: half way.*as it was before the pass"
    refused(model, DYNAMIC, PassError, match, **options)


def test_a_pass_that_leaves_an_illegal_program(refused, monkeypatch):
    def spoil(self, program, context):
        linear = program.nodes(aten.linear.default)[0]
        linear.meta["val"] = torch.empty(1)
        return fxopt.passes.base.PassResult()

    monkeypatch.setattr(Quantize, "run", spoil)
    refused(mlp(), DYNAMIC, PassError, "left an illegal program", example_inputs=example())


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ({"expect": {"quantize": {"min_sites": 3}}}, ExpectationError, "2 sites, at least 3"),
        ({"expect": {"quantize": {"max_sites": 1}}}, ExpectationError, "2 sites, at most 1"),
        ({"floor": {"sqnr_db": 200}}, QualityFloorError, "SQNR.*finer granularity"),
    ],
)
def test_what_a_recipe_demands(refused, extra, error, match):
    refused(mlp(), {**DYNAMIC, **extra}, error, match, example_inputs=example())


@pytest.mark.parametrize(
    ("target", "match"), [("cuda", r"\.to\('cuda'\)"), ("tpu", "choose one of auto")]
)
def test_targets_that_are_not_here(refused, target, match):
    refused(mlp(), CANONICAL, LoweringError, match, example_inputs=example(), target=target)


def test_a_wrong_target_does_not_cost_the_model():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(LoweringError):
        optimize(model, CANONICAL, example_inputs=example(), target="tpu", inplace=True)
    assert_untouched(model, before)


def test_a_verify_mode_that_does_not_exist(refused):
    refused(mlp(), CANONICAL, FxoptError, "full", example_inputs=example(), verify="fulll")


# --- progress, verify, inplace --------------------------------------------------------------


def test_progress_is_told_the_stages_in_order():
    told = []
    optimize(
        mlp(),
        STATIC,
        example_inputs=example(),
        calibration=[example(), example()],
        progress=lambda stage, detail="": told.append((stage, detail)),
    )
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages == ["capture", "canonicalize", "quantize", "lower"]
    details = [detail for stage, detail in told if stage == "quantize"]
    assert "calibration batch 2/2" in details
    assert {"up", "down"} <= set(details)


def test_large_calibration_batches_are_judged_on_few_rows():
    program = canonical_program("llama")
    batches = [{"input_ids": torch.arange(3, 75).reshape(9, 8)}] * 3
    samples = LazySamples(program, Recipe.resolve(STATIC), batches, None)
    judged = samples.few()
    assert len(judged) == 2
    names = [spec.name for spec in program.signature.inputs]
    for inputs in judged:
        assert {value.shape[0] for value in inputs} == {2}
        ids = inputs[names.index("input_ids")]
        assert torch.equal(ids, batches[0]["input_ids"][:2])
        run(program, inputs)
    assert {sample.inputs[0].shape[0] for sample in samples()} == {9}


@pytest.mark.parametrize("mode", ["full", "fast", "off"])
def test_verify_modes(mode):
    optimized = optimize(mlp(), DYNAMIC, example_inputs=example(), verify=mode)
    first, second = (record.verification for record in optimized.report.history)
    assert second["mode"] == mode
    assert ("sqnr_db" in second) == (mode != "off")
    assert first["mode"] in (mode, "nothing changed")
    assert ("error_float64" in first) == (mode == "full" and first["mode"] == "full")


def test_verify_of_the_recipe_is_used_unless_overridden():
    recipe = {**DYNAMIC, "verify": "off"}
    optimized = optimize(mlp(), recipe, example_inputs=example())
    assert optimized.report.history[-1].verification == {"mode": "off"}


@pytest.mark.parametrize("recipe", [CANONICAL, DYNAMIC], ids=["canonical", "dynamic"])
def test_the_model_is_untouched_and_shares_no_memory(recipe):
    model, x = mlp(), example()
    before = snapshot(model)
    expected = model(*x)["y"]
    optimized = optimize(model, recipe, example_inputs=x)
    assert_untouched(model, before)
    assert torch.equal(model(*x)["y"], expected)
    result = optimized(*x)["y"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(optimized(*x)["y"], result)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_batch_length_and_padding(name):
    model = hf_model(name)
    before = snapshot(model)
    calls = [sized_inputs(name, *size) for size in ((1, 1), (1, 7), (3, 1), (2, 13), (5, 2))]
    with torch.no_grad():
        expected = [model(**inputs)[0] for inputs in calls]
    optimized = optimize(model, DYNAMIC, verify="fast")
    for inputs, wanted in zip(calls, expected, strict=True):
        result = optimized(**inputs)[0]
        real = inputs["attention_mask"].bool()
        assert result.shape == wanted.shape
        assert float((result - wanted)[real].norm() / wanted[real].norm()) < 0.1
    assert_untouched(model, before)
    with torch.no_grad():
        assert all(
            torch.equal(model(**inputs)[0], wanted)
            for inputs, wanted in zip(calls, expected, strict=True)
        )


def sized_inputs(name: str, batch: int, length: int) -> dict:
    """Random tokens, the first row padded: decoders on the left, encoders on the right."""
    generator = torch.Generator().manual_seed(batch * length)
    mask = torch.ones(batch, length, dtype=torch.long)
    padded = slice(0, length // 2) if name == "llama" else slice(length - length // 2, length)
    mask[0, padded] = 0
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def test_inplace_takes_the_weights_over():
    model, x = mlp(), example()
    optimized = optimize(model, DYNAMIC, example_inputs=x, inplace=True)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert torch.equal(optimized(*x)["y"], optimized_mlp()(*x)["y"])


def test_inplace_keeps_the_model_where_a_pass_fails():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(CalibrationError):
        optimize(model, STATIC, example_inputs=example(), inplace=True)
    assert_untouched(model, before)


def test_inplace_keeps_the_model_where_a_kernel_is_found_wrong(monkeypatch):
    """Kernels are checked last of all; the model is given up after that."""
    wanted = dict.fromkeys([torch.float32], torch.nan)  # no kernel is that good
    monkeypatch.setattr("fxopt.pipeline.lowered_check.KERNEL_SQNR_DB", wanted)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(LoweringError, match=r"differs from its reference.*target='reference'"):
        optimize(model, DYNAMIC, example_inputs=example(), inplace=True)
    assert_untouched(model, before)


def test_a_model_in_training_mode_is_captured_as_for_inference_and_stays_in_training():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).train()
    optimized = optimize(model, CANONICAL, example_inputs=example())
    assert model.training
    assert torch.equal(optimized(*example()), optimized(*example()))


# --- capture, diff, lists -------------------------------------------------------------------


def test_capture_and_diff():
    program = fxopt.capture(mlp(), example())
    assert isinstance(program, fxopt.Program)
    assert program.level is Level.CAPTURED
    assert len(program.nodes(aten.linear.default)) == 2
    assert not fxopt.diff(program, program)
    found = fxopt.diff(program, optimized_mlp())
    assert found
    assert found.bytes_before > found.bytes_after
    assert set(found.modules) == {"up", "down"}
    assert "up.weight_int8" in found.weights
    assert str(found.weights["up.weight"]).startswith("removed (")
    assert not fxopt.diff(optimized_mlp(), optimized_mlp())


def test_only_programs_are_compared():
    with pytest.raises(InputError, match=r"compare a Mlp.*fxopt\.capture\(model\)"):
        fxopt.diff(optimized_mlp(), mlp())


def test_passes_and_recipes_have_a_line_each():
    passes, recipes = fxopt.passes(), fxopt.recipes()
    assert {"canonicalize", "quantize"} <= set(passes)
    assert {"canonical", "w8a8-dynamic", "w8a8-static", "w8a16"} <= set(recipes)
    for line in [*passes.values(), *recipes.values()]:
        assert line
        assert "\n" not in line
        assert line.endswith(".")


# --- report and explain ---------------------------------------------------------------------


def test_explain_one_module():
    text = optimized_mlp().explain("up")
    assert text.splitlines()[0] == "up"
    assert "int8 weight per channel, int8 activation per token" in text
    assert "dB after this pass" in text
    assert "DynamicLinear" in text
    assert "down" not in text
    with pytest.raises(InputError, match="no module 'upp'.*Did you mean 'up'"):
        optimized_mlp().explain("upp")
    with pytest.raises(InputError, match="no module 'zzz'. There are 'down', 'up' and so on"):
        optimized_mlp().explain("zzz")


def test_report_as_markdown_and_html(tmp_path):
    report = optimized_mlp().report
    markdown = report.to_markdown()
    assert markdown.startswith("# fxopt report: Mlp")
    assert "## Passes" in markdown
    assert "| quantize | 2 | 0 |" in markdown
    assert f"{report.bytes_before:,} -> {report.bytes_after:,} bytes" in markdown
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page
    assert "quantize" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    with pytest.raises(FxoptError, match="report cannot be written"):
        report.to_html(tmp_path / "nowhere" / "report.html")


def test_report_counts_what_is_there():
    optimized = optimized_mlp()
    report = optimized.report
    assert report.model_class == "Mlp"
    assert report.target == "cpu"
    assert report.bytes_after == optimized.program.byte_count()
    assert report.bytes_before == sum(p.numel() * 4 for p in mlp().parameters())
    assert [len(record.sites) for record in report.history][1] == 2
    assert report.history[1].verification["sqnr_db"] > 30


# --- save and load in a new process ---------------------------------------------------------

LOADER = """
import sys
import torch
import fxopt

folders = sys.argv[1:]
for folder in folders:
    model = fxopt.load(f"{folder}/model")
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        result = model(**inputs)
    outputs = {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}
    if model.extra.get("can_generate"):
        for beams in (1, 2):
            options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
            outputs[f"tokens{beams}"] = model.generate(**inputs, **options)
    torch.save([type(model).__name__, type(result).__name__, outputs], f"{folder}/outputs.pt")
    assert model.report.history, folder
    assert model.recipe["passes"], folder
foreign = [n for n in sys.modules if ".modeling_llama" in n or ".modeling_bert" in n]
assert not foreign, foreign
"""
SAVED = {
    "llama-canonical": ("llama", CANONICAL),
    "llama-gate": ("llama", "w8a8-dynamic"),
    "bert-canonical": ("bert", CANONICAL),
    "bert-gate": ("bert", "w8a8-dynamic"),
    "plain-canonical": ("plain", CANONICAL),
    "plain-gate": ("plain", "w8a8-dynamic"),
    "plain-dynamic": ("plain", DYNAMIC),
}


def saved_inputs(name: str) -> dict:
    if name == "plain":
        return {"x": example()[0]}
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if name == "llama":
        mask[0, :2] = 0
    else:
        mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs_of(optimized, inputs: dict) -> list:
    with torch.no_grad():
        result = optimized(**inputs)
    outputs = {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}
    if optimized.extra.get("can_generate"):
        for beams in (1, 2):
            options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
            outputs[f"tokens{beams}"] = optimized.generate(**inputs, **options)
    return [type(optimized).__name__, type(result).__name__, outputs]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """What each saved model computes here and in one new process."""
    here, folders = {}, {}
    for case, (name, recipe) in SAVED.items():
        folder = folders[case] = tmp_path_factory.mktemp(case)
        model = mlp() if name == "plain" else hf_model(name)
        options = {"example_inputs": example()} if name == "plain" else {}
        optimized = optimize(model, recipe, verify="off", **options)
        optimized.save_pretrained(folder / "model")
        inputs = saved_inputs(name)
        torch.save(inputs, folder / "inputs.pt")
        here[case] = outputs_of(optimized, inputs)
    script = tmp_path_factory.mktemp("script") / "loader.py"
    script.write_text(LOADER)
    done = subprocess.run(
        [sys.executable, "-P", str(script), *map(str, folders.values())],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = {case: torch.load(folder / "outputs.pt") for case, folder in folders.items()}
    return here, there


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("case", SAVED)
def test_a_reloaded_model_is_bit_equal_in_a_new_process(reloaded, case):
    here, there = reloaded
    assert there[case][:2] == here[case][:2]
    ours, theirs = here[case][2], there[case][2]
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ("tokens1" in ours) == case.startswith("llama")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_was_saved_is_what_the_model_computes(reloaded, name):
    """Bit-equal to a wrong result would be no good."""
    model, inputs = hf_model(name), saved_inputs(name)
    with torch.no_grad():
        expected = model(**inputs)
    key = "logits" if name == "llama" else "last_hidden_state"
    real = inputs["attention_mask"].bool()
    for case, allowed in ((f"{name}-canonical", 1e-4), (f"{name}-gate", 0.1)):
        ours = reloaded[1][case][2][key][real]
        error = (ours - expected[key][real]).norm() / expected[key][real].norm()
        assert float(error) < allowed
    if name == "llama":
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(reloaded[1]["llama-canonical"][2]["tokens1"], tokens)
