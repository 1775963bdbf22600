"""What allocate-bits takes for the loss of a choice: curvature times the square of its rounding."""

import numpy as np
import pytest
import torch

from fxopt.analysis.curvature import eigenvalues, traces
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.linear_groups import linear_groups
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.rounding_trials import Trials
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import as_sample, bert_batch

aten = torch.ops.aten
CHOICES = (Choice(WeightOptions("int2")), Choice(WeightOptions("int4")), Choice())
PROBES = 3
# One group of three linears, and one of one.
LINEARS = ("*layer.0.attention.self.*", "*layer.0.intermediate.*")


def silent(detail: str) -> None:
    del detail


def program_and_samples():
    program = canonical_program("bert")
    # Of unlike lengths, so that their Hessians differ.
    return program, [as_sample(program, bert_batch(2, length, 0)) for length in (5, 9)]


@pytest.mark.parametrize("sensitivity", ["trace", "eigenvalue"])
def test_losses_are_curvature_times_squared_rounding(sensitivity):
    program, samples = program_and_samples()
    groups, _ = linear_groups(program, CHOICES, LINEARS, ())
    assert any(len(group.linears) > 1 for group in groups)
    found = Trials(program, samples, groups, CHOICES).losses(sensitivity, PROBES, silent)
    linears = [linear for group in groups for linear in group.linears]
    measure = {"trace": traces, "eigenvalue": eigenvalues}[sensitivity]
    bends = dict(zip(linears, measure(program, samples, linears, PROBES), strict=True))
    expected = np.zeros(found.shape)
    for row, group in enumerate(groups):
        for column, choice in enumerate(CHOICES[:2]):
            for linear in group.linears:
                weight = program.weight(str(linear.args[1].target))
                rounded = choose_grid(weight, choice.weights).round(weight)
                bend = max(bends[linear], 0.0) / (weight.numel() if sensitivity == "trace" else 1)
                expected[row, column] += bend / 2 * float((rounded - weight).square().sum())
    assert np.allclose(found, expected, rtol=1e-4)
    assert (found[:, 0] > found[:, 1]).all()


def test_sensitivities_are_three_different_losses():
    program, samples = program_and_samples()
    groups, _ = linear_groups(program, CHOICES, LINEARS, ())
    trials = Trials(program, samples, groups, CHOICES)
    kinds = ("output", "trace", "eigenvalue")
    losses = [trials.losses(kind, PROBES, silent)[:, 0] for kind in kinds]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.allclose(losses[one], losses[other], rtol=0.05)


def test_an_eigenvalue_that_varies_over_batches_counts_by_its_deviation():
    program, samples = program_and_samples()
    linear = program.nodes(aten.linear.default)[1]
    iterations = 60  # so that where it starts does not matter
    alone = [eigenvalues(program, [sample], [linear], iterations)[0] for sample in samples]
    (both,) = eigenvalues(program, samples, [linear], iterations)
    assert abs(alone[0] - alone[1]) > 0.05 * alone[0]
    mean, deviation = sum(alone) / 2, abs(alone[0] - alone[1]) / 2
    assert both == pytest.approx(abs(mean) + deviation, rel=0.02)
