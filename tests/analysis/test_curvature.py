"""Hessians: traces and eigenvalues of known ones, and the products of real programs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analysis.curvature import (
    Loss,
    eigenvalues,
    hutchinson_traces,
    largest_eigenvalue,
    traces,
)
from fxopt.analysis.execution import run, run_float64
from fxopt.analysis.output_error import OutputError, divergence, is_logits, judged_outputs
from fxopt.analysis.samples import real_rows
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import as_sample, bert_batch

aten = torch.ops.aten


def spectrum(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator, dtype=torch.float64) * 5
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(values) @ basis.T, values


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_quadratic_gives_its_own_trace_and_largest_eigenvalue(seed):
    a, values = spectrum(seed, 12)
    generator = torch.Generator().manual_seed(seed)
    like = torch.zeros(3, 4, dtype=torch.float64)
    (found,) = hutchinson_traces(
        lambda v: [(a @ v[0].flatten()).reshape(3, 4)], [like], 4000, generator
    )
    assert found == pytest.approx(float(values.sum()), rel=0.1)
    largest = largest_eigenvalue(
        lambda v: (a @ v.flatten()).reshape(3, 4), like, 2000, generator, tolerance=1e-12
    )
    assert largest == pytest.approx(float(values.max()), rel=1e-3)


def test_a_zero_hessian_is_no_division_by_zero():
    like = torch.zeros(2, 2)
    assert largest_eigenvalue(lambda v: 0 * v, like, 5, torch.Generator()) == 0.0


def sample_of(name: str):
    program = canonical_program(name)
    if name == "bert":
        return program, as_sample(program, bert_batch(2, 5, 0))
    from fxopt.analysis.samples import Sample

    return program, Sample(program.examples[0], None)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "gpt2"])
def test_products_are_the_second_differences_of_the_distance(name):
    program, sample = sample_of(name)
    linear = program.nodes(aten.linear.default)[1]
    loss = Loss(program, sample, [linear])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(loss.weights[0].shape, generator=generator)
    (product,) = loss.product([direction])
    bend = float((direction * product).sum())
    assert bend > 0
    weight, step = str(linear.args[1].target), 3e-3

    def distance(scale: float) -> float:
        twin = program.clone()
        twin.set_weight(weight, program.weight(weight) + scale * direction)
        before, after = (run_float64(p, sample.inputs) for p in (program, twin))
        total = 0.0
        for index in judged_outputs(program):
            a, b = (real_rows(outputs[index], sample.tokens) for outputs in (before, after))
            if is_logits(program.signature.outputs[index]):
                total += float(divergence(a, b).mean())
            else:
                total += float((a - b).square().sum() / a.square().sum())
        return total

    second = (distance(step) + distance(-step)) / step**2
    assert second == pytest.approx(bend, rel=0.05)


def test_traces_and_eigenvalues_agree_on_which_layers_bend_most():
    program, sample = sample_of("bert")
    linears = program.nodes(aten.linear.default)[:4]
    told = traces(program, [sample], linears, probes=64)
    largest = eigenvalues(program, [sample], linears, iterations=30)
    assert all(0 < top < trace * 1.2 for top, trace in zip(largest, told, strict=True))
    assert traces(program, [sample], linears, probes=64) == told  # seeded


def test_every_floating_output_counts_and_caches_do_not():
    program = canonical_program("bert")
    assert judged_outputs(program) == [0, 1]  # hidden states and the pooled one
    decoder = canonical_program("llama")
    assert judged_outputs(decoder) == [0]
    assert is_logits(decoder.signature.outputs[0])


def test_errors_are_those_of_real_tokens():
    program = canonical_program("bert")
    sample = as_sample(program, bert_batch(3, 7, 1))
    exact = run(program, sample.inputs)
    error = OutputError.of(program, [sample], [exact])
    assert error.cost([exact]) == 0
    assert error.sqnr_db([exact]) == float("inf")
    padded = [value.clone() for value in exact]
    padded[0][~sample.tokens] += 100
    assert error.cost([padded]) == 0
    padded[0][sample.tokens] *= 1.1
    rows = real_rows(exact[0], sample.tokens)
    assert rows.shape[0] == int(sample.tokens.sum())
    assert error.cost([padded]) == pytest.approx(0.01, rel=1e-4)
    assert error.sqnr_db([padded]) == pytest.approx(20, abs=0.01)
