"""Corrected biases: the mean error over the calibration data is zero, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.analysis.execution import run
from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Program, module_path
from fxopt.ir.stored_codes import stored_values
from fxopt.passes.quantization.bias_correction import mean_error
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.options import ActivationOptions, EmbeddingOptions, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier
from tests.graphs import signature_of
from tests.lowering.test_lower import UNTIMED, check, kernels, lower
from tests.models import canonical_program
from tests.passes.quantization.test_gptq import samples_of
from tests.passes.quantization.test_quantize import Tied, Wide, captured

aten = torch.ops.aten
INT3 = WeightOptions("int3")


def apply(program: Program, samples, *passes) -> Program:
    return Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, passes)


def corrected(program: Program, samples, weights=INT3, **options) -> Program:
    return apply(program, samples, Quantize(weights, bias_correction=True, **options))


def linears(program: Program) -> dict:
    return {module_path(node): node for node in program.nodes(aten.linear.default)}


def bias_of(program: Program, node) -> Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return None if bias is None else program.constant(bias)


def mean_errors(before: Program, after: Program, samples) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each linear, on the inputs it had before: E[error] and the rms of the outputs."""
    means = collect(before, linear_inputs(before), samples)["mean"]
    rows = collect(before, linear_inputs(before), samples, rows=64)["rows"]
    found = {}
    for path, node in linears(before).items():
        other = linears(after)[path]
        mean = means[node.args[0].name]
        w, q = before.constant(node.args[1]).double(), stored_values(after, other.args[1]).double()
        error = (q - w) @ mean
        for sign, bias in ((1, bias_of(after, other)), (-1, bias_of(before, node))):
            error = error + (0 if bias is None else sign * bias.double())
        found[path] = error, (rows[node.args[0].name].double() @ w.T).square().mean().sqrt()
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 700))
def test_the_mean_error_is_that_of_the_mean(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    w, q = torch.randn(2, rows, 6, generator=generator)
    x = torch.randn(50, 6, generator=generator) + 1
    expected = (x.double() @ (q.double() - w.double()).T).mean(0)
    assert torch.allclose(mean_error(w, q, x.double().mean(0)), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("weights", [INT3, WeightOptions("nf4", "group", 16)])
def test_the_mean_error_of_every_linear_is_zero(name, weights):
    before = canonical_program(name)
    samples = samples_of(before) if name == "bert" else [Sample(x) for x in before.examples[:2]]
    plain = apply(before, samples, Quantize(weights))
    after = corrected(before, samples, weights)
    for path, (error, size) in mean_errors(before, after, samples).items():
        assert float(error.abs().max()) < 1e-6 * float(size) + 1e-7
        uncorrected = mean_errors(before, plain, samples)[path][0]
        assert float(uncorrected.abs().max()) > 1e-4 * float(size)
    assert all(site.detail.endswith(", bias corrected") for site in after.history[-1].sites)


def test_outputs_of_one_layer_have_the_mean_of_the_original():
    program = captured(nn.Sequential(nn.Linear(16, 8)), torch.randn(2, 3, 16))
    samples = [Sample([torch.randn(4, 7, 16) + 1]) for _ in range(3)]
    after = corrected(program, samples)
    outputs = [torch.cat([run(p, s.inputs)[0] for s in samples]) for p in (program, after)]
    expected, found = (y.flatten(0, 1).mean(0, dtype=torch.float64) for y in outputs)
    assert torch.allclose(expected, found, atol=1e-6)
    assert not torch.allclose(*outputs, atol=1e-2)


def test_only_biases_and_weights_of_the_sites_change():
    before = canonical_program("bert")
    samples, text, held = samples_of(before), signature_of(before), dict(before.weights())
    after = corrected(before, samples, exclude=("*.intermediate.*",))
    plain = apply(before, samples, Quantize(INT3, exclude=("*.intermediate.*",)))
    assert signature_of(before) == text
    assert [n.name for n in after.nodes()] == [n.name for n in plain.nodes()]
    sites = {site.path for site in after.history[-1].sites}
    for path, node in linears(after).items():
        original = held[str(linears(before)[path].args[2].target)]
        same = bias_of(after, node).data_ptr() == original.data_ptr()
        assert same == (path not in sites)
    with pytest.warns(UserWarning, match="changed nothing"):
        again = corrected(after, samples, exclude=("*.intermediate.*",))
    assert signature_of(again) == signature_of(after)


def test_a_linear_without_a_bias_gets_one():
    before = canonical_program("llama")
    samples = [Sample(x) for x in before.examples[:2]]
    after = corrected(before, samples)
    assert all(bias_of(before, node) is None for node in linears(before).values())
    for path, node in linears(after).items():
        assert str(node.args[2].target) == f"{path}.corrected_bias"
    for error, size in mean_errors(before, after, samples).values():
        assert float(error.abs().max()) < 1e-6 * float(size) + 1e-7
    lowered = lower(after, UNTIMED)
    assert kernels(lowered.program)["linear_w4a16"] > 0
    check(after, lowered)


def test_weights_that_rounding_keeps_need_no_correction():
    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            for linear in (self.first, self.second):
                linear.weight.data = torch.randint(-3, 4, (8, 8)).float()
                linear.weight.data[:, 0] = 3

        def forward(self, x):
            return self.second(self.first(x))

    program = captured(Exact(), torch.randn(2, 3, 8))
    samples = [Sample([torch.randn(4, 7, 8) + 1])]
    after = corrected(program, samples)
    assert signature_of(after) == signature_of(apply(program, samples, Quantize(INT3)))
    assert not any("corrected" in site.detail for site in after.history[-1].sites)


def test_tied_linears_have_biases_of_their_own():
    program = captured(Tied(), torch.zeros(2, 3).long())
    samples = [Sample([torch.randint(0, 12, (4, 9))])]
    after = corrected(program, samples, embeddings=EmbeddingOptions())
    first, second = after.nodes(aten.linear.default)
    assert first.args[1] is not second.args[1] or first.args[2] is not second.args[2]
    for error, size in mean_errors(program, after, samples).values():
        assert float(error.abs().max()) < 1e-6 * float(size) + 1e-7


def test_bfloat16_errs_by_the_rounding_of_the_bias():
    module = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    program = captured(module, torch.randn(2, 3, 16).bfloat16())
    samples = [Sample([(torch.randn(4, 50, 16) + 1).bfloat16()])]
    after = corrected(program, samples)
    (node,) = after.nodes(aten.linear.default)
    bias = bias_of(after, node)
    assert bias.dtype == torch.bfloat16
    ((error, _),) = mean_errors(program, after, samples).values()
    assert bool((error.abs() <= bias.double().abs() * 2**-8 + 1e-12).all())


@pytest.mark.parametrize("true_sequential", [True, False])
def test_gptq_corrects_on_the_inputs_that_it_sees(true_sequential):
    program = captured(Wide(24), torch.randn(2, 3, 24))
    samples = [Sample([torch.randn(4, 20, 24) + 1]) for _ in range(2)]
    chosen = {"weights": WeightOptions("int2"), "true_sequential": true_sequential}
    chosen["match_original"] = False
    after = apply(program, samples, Gptq(bias_correction=True, **chosen))
    found = linears(after)
    assert set(found) == {"first", "second"}
    seen = after if true_sequential else program
    means = collect(seen, linear_inputs(seen), samples)["mean"]
    for path, node in linears(program).items():
        w = program.constant(node.args[1]).double()
        q = stored_values(after, found[path].args[1]).double()
        moved = bias_of(after, found[path]).double() - bias_of(program, node).double()
        mean = means[linears(seen)[path].args[0].name]
        assert float(((q - w) @ mean).abs().max()) > 1e-4
        assert float(((q - w) @ mean + moved).abs().max()) < 1e-6


def test_padding_is_left_out_and_means_are_signed():
    program = captured(Wide(), torch.randn(2, 3, 8))
    x = torch.randn(2, 3, 8)
    tokens = torch.tensor([[True, True, True], [True, False, False]])
    found = collect(program, linear_inputs(program), [Sample([x], tokens)])
    source = program.nodes(aten.linear.default)[0].args[0].name
    assert torch.allclose(found["mean"][source], x[tokens].double().mean(0))
    assert torch.allclose(found["mean_abs"][source], x[tokens].abs().double().mean(0))


def test_what_it_needs_is_asked_for():
    with pytest.raises(RecipeError, match="weights is null"):
        Quantize(None, ActivationOptions(), bias_correction=True)
    with pytest.raises(CalibrationError, match="'quantize' needs calibration data"):
        corrected(canonical_program("bert"), [])
    recipe = Recipe.resolve(["canonicalize", {"quantize": {"bias_correction": True}}])
    assert [need.statistic for need in recipe.build()[1].needs()] == ["mean"]
