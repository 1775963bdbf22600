"""Mixed precision: which activations are given back, in which order, and nothing besides."""

import pytest
import torch

from fxopt.analysis.execution import run
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Program
from fxopt.passes.quantization.mixed_precision import MixedPrecision, static_activations
from fxopt.passes.quantization.options import ActivationOptions
from fxopt.passes.quantization.quantize import Quantize
from tests.graphs import signature_of
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import (
    TENSOR,
    TOKEN,
    apply,
    as_sample,
    bert_batch,
    manager,
    refusals,
)

ops = torch.ops.fxopt


def quantized(options: ActivationOptions = TENSOR) -> tuple[Program, list]:
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, seed)) for seed in (0, 1)]
    return apply(program, samples, activations=options), samples


def kept(program: Program) -> list[str]:
    return [site.path for site in program.history[-1].sites]


def output(program: Program, samples) -> torch.Tensor:
    real = samples[0].tokens
    return run(program, samples[0].inputs)[0][real].double()


def test_more_kept_is_a_longer_list_and_less_error():
    before, samples = quantized()
    activations = static_activations(before)
    exact = manager(samples).run(before, [MixedPrecision(keep=100)])
    assert not static_activations(exact)
    assert len(kept(exact)) == len(activations)
    reference = output(exact, samples)
    order, errors = [], []
    for keep in (1, 2, 4):
        after = manager(samples).run(before, [MixedPrecision(keep=keep)])
        assert kept(after)[: len(order)] == order
        order = kept(after)
        assert len(order) == keep
        assert len(static_activations(after)) == len(activations) - keep
        errors.append(float((output(after, samples) - reference).norm()))
    whole = float((output(before, samples) - reference).norm())
    assert errors[0] < whole
    assert errors[2] < errors[0]


def test_with_every_activation_kept_only_the_weights_are_rounded():
    before, samples = quantized()
    every = manager(samples).run(before, [MixedPrecision(keep=100)])
    weights = apply(canonical_program("bert"), activations=None)
    inputs = samples[0].inputs
    for one, other in zip(run(every, inputs), run(weights, inputs), strict=True):
        assert torch.equal(one, other)


def test_it_is_deterministic_and_does_nothing_the_second_time():
    before, samples = quantized()
    passes = manager(samples)
    first, second = (passes.run(before, [MixedPrecision(keep=3)]) for _ in range(2))
    assert signature_of(first) == signature_of(second)
    assert first.history[-1].sites == second.history[-1].sites
    again = passes.run(first, [MixedPrecision(keep=3)])
    assert signature_of(again) == signature_of(first)
    assert kept(again) == []


def test_a_target_is_reached_with_no_more_than_it_takes():
    before, samples = quantized()
    every = manager(samples).run(before, [MixedPrecision(keep=100)])
    errors = [
        float(site.detail.partition(", error ")[2].split()[0]) for site in every.history[-1].sites
    ]
    target = errors[2] * 1.001
    after = manager(samples).run(before, [MixedPrecision(keep=100, target=target)])
    assert len(kept(after)) == next(i + 1 for i, error in enumerate(errors) if error <= target)
    again = manager(samples).run(after, [MixedPrecision(keep=100, target=target)])
    assert kept(again) == []


def test_weights_and_other_activations_stay_as_they_are():
    before, samples = quantized()
    after = manager(samples).run(before, [MixedPrecision(keep=2)])
    left = dict(after.weights())
    gone = set(before.weights()) - set(left)
    assert gone
    assert all("_activation_" in name for name in gone)
    assert all(
        before.weights()[name].data_ptr() == value.data_ptr() for name, value in left.items()
    )
    removed = len(before.nodes(ops.quantize.default)) - len(after.nodes(ops.quantize.default))
    linears = static_activations(before)
    assert removed == sum(
        len(found) for name, found in linears.items() if name not in static_activations(after)
    )


@pytest.mark.parametrize("options", [None, TOKEN], ids=["weights only", "per token"])
def test_without_static_activations_it_says_so(options):
    before, samples = quantized(options)
    after = manager(samples).run(before, [MixedPrecision()])
    assert signature_of(after) == signature_of(before)
    assert any("static scale" in reason for reason in refusals(after).values())


def test_it_needs_data_and_options_that_make_sense():
    before, _ = quantized()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        manager().run(before, [MixedPrecision()])
    for wrong in (
        {"keep": -1},
        {"target": -0.1},
        {"target": float("nan")},
        {"target": float("inf")},
        {"batches": 0},
    ):
        with pytest.raises(RecipeError, match="negative"):
            MixedPrecision(**wrong)
    assert Quantize.name in MixedPrecision.after
