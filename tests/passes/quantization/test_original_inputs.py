"""Weights that make up for what rounding before them has changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.analysis.calibration import linear_inputs
from fxopt.analysis.execution import run as run_program
from fxopt.ir.program import Program
from fxopt.ir.stored_codes import stored_values
from fxopt.passes.quantization import original_inputs
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.original_inputs import RIDGE, InputChange, OriginalInputs
from fxopt.passes.quantization.seen_inputs import ColumnRounding
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.models import canonical_program
from tests.passes.quantization.test_gptq import by_path, output_distance, samples_of

aten = torch.ops.aten


def problem(seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs, and the same inputs with an error that follows them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=generator)
    x = torch.randn(200, 12, generator=generator) @ mix
    error = noise * torch.randn(12, 12, generator=generator)
    return torch.randn(7, 12, generator=generator), x, x + x @ error


def change(original: list[Tensor], present: list[Tensor]) -> InputChange:
    moments = sum((y.double().T @ y.double() for y in present), torch.zeros(12, 12).double())
    return InputChange(original, present, moments)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 1), cut=st.integers(1, 199))
def test_it_is_the_least_squares_weight_with_a_ridge(seed, noise, cut):
    weight, x, y = (value.double() for value in problem(seed, noise))
    found = change([x[:cut], x[cut:]], [y[:cut], y[cut:]]).make_up(weight)
    ridge = (RIDGE * y.square().sum(0).mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    rows = torch.cat([y, ridge])
    outputs = torch.cat([x @ weight.T, ridge @ weight.T])
    expected = torch.linalg.lstsq(rows, outputs).solution.T
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    before, after = ((x @ weight.T - y @ v.T).norm() for v in (weight, found))
    assert float(after) <= float(before) * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 1))
def test_what_a_grid_errs_against_it_is_what_it_errs_against_the_original(seed, noise):
    """|| X W^T - Y Q^T ||^2 - || Y V^T - Y Q^T ||^2 is the same for all Q without a ridge."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    x, error = torch.randn(2, 200, 12, generator=generator, dtype=torch.float64)
    y = x + noise * error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original_inputs, "RIDGE", 0.0)
        exact = change([x], [y]).make_up(weight)
    rests = []
    for _ in range(3):
        q = weight + 0.1 * torch.randn(7, 12, generator=generator, dtype=torch.float64)
        theirs, mine = (x @ weight.T - y @ q.T).norm() ** 2, (y @ (exact - q).T).norm() ** 2
        rests.append(float(theirs - mine))
    assert max(rests) - min(rests) <= 1e-4 * float((x @ weight.T).norm() ** 2)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_in_gptq_damping_adds_to_the_ridge(damping):
    weight, x, y = problem(1)
    seen = ColumnRounding(damping, True, 128, True, True).seen(([y], [x]))
    ridge = RIDGE * (1 + damping) + damping
    total = (ridge * y.square().sum(0).mean()).sqrt() * torch.eye(12)
    outputs = torch.cat([x @ weight.T, total @ weight.T])
    expected = torch.linalg.lstsq(torch.cat([y, total]), outputs).solution.T
    assert seen.change is not None
    assert torch.allclose(seen.change.make_up(weight), expected, atol=1e-3)


def test_equal_inputs_leave_the_weight_alone():
    weight, x, _ = problem(0)
    assert change([x], [x.clone()]).make_up(weight) is weight


def test_tokens_that_only_one_model_sends_to_an_expert_count_as_unchanged():
    weight, x, y = problem(0)
    left, came = x.clone(), y.clone()
    left[:20] = 0  # the original sends them elsewhere
    came[180:] = 0  # the rounded model does
    found = change([left], [came]).make_up(weight)
    same = torch.cat([y[:20], x[20:180]])
    assert torch.allclose(found, change([same], [y[:180]]).make_up(weight), atol=1e-5)


def test_no_token_in_common_leaves_the_weight_alone():
    weight, x, y = problem(0)
    assert change([x], [torch.zeros_like(y)]).make_up(weight) is weight


def test_bfloat16_weights_stay_bfloat16():
    weight, x, y = problem(0)
    found = change([x.bfloat16()], [y.bfloat16()]).make_up(weight.bfloat16())
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, weight.bfloat16())


# --- on programs ----------------------------------------------------------------------------


def rounded(program: Program, **options) -> Program:
    samples = samples_of(program, 8)
    manager = Manager(Verifier((), mode="off"), samples=lambda: samples)
    return manager.run(program, [Gptq(WeightOptions("int3"), **options)])


def stored(program: Program) -> dict[str, Tensor]:
    found = by_path(program).items()
    return {path: stored_values(program, node.args[1]) for path, node in found}


def test_the_run_beside_gives_what_the_original_reads():
    program = canonical_program("bert")
    samples = samples_of(program, 2)
    linears = program.nodes(aten.linear.default)
    original = OriginalInputs(program, samples, linears[::2])
    names = {node.name for node in linear_inputs(program)}
    seen: list[dict[str, Tensor]] = []
    for sample in samples:
        seen.append({})
        run_program(
            program,
            sample.inputs,
            lambda node, value: seen[-1].update({node.name: value} if node.name in names else {}),
        )
    for linear in linears[::2]:
        for rows, values, sample in zip(original.rows(linear), seen, samples, strict=True):
            value = values[linear.args[0].name]
            expected = value if value.dim() < 3 else value[sample.tokens]
            assert torch.allclose(rows, expected.reshape(rows.shape), atol=1e-6)


def test_outputs_come_nearer_to_those_of_the_original():
    program = canonical_program("bert")
    samples = samples_of(program, 8)
    plain, matched = (rounded(program, match_original=match) for match in (False, True))
    distances = [output_distance(program, after, samples) for after in (plain, matched)]
    assert distances[1] < 0.95 * distances[0]


def test_the_first_linears_have_nothing_to_make_up_for():
    program = canonical_program("bert")
    plain, matched = (stored(rounded(program, match_original=match)) for match in (False, True))
    equal = [path for path in plain if torch.equal(plain[path], matched[path])]
    first = ["query", "key", "value"]
    assert equal == [f"encoder.layer.0.attention.self.{name}" for name in first]


def test_on_inputs_of_the_original_model_there_is_nothing_to_make_up_for():
    program = canonical_program("bert")
    one, other = (
        stored(rounded(program, match_original=match, true_sequential=False))
        for match in (False, True)
    )
    assert all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("match", [False, True])
def test_means_of_outputs_are_those_of_the_original(match):
    """With bias correction, on the calibration data: matched to those of the original model."""
    program = canonical_program("bert")
    samples = samples_of(program, 8)
    after = rounded(program, match_original=match, bias_correction=True)
    paths = [path for path in by_path(program) if "layer.1" in path]
    gaps: dict[str, float] = {}
    for path in paths:
        means: list[Tensor] = []
        for one in (program, after):
            wanted, rows = by_path(one)[path], []
            for sample in samples:

                def watch(node, value, wanted=wanted, rows=rows, sample=sample):
                    if node is wanted:
                        rows.append(value[sample.tokens].double())

                run_program(one, sample.inputs, watch)
            means.append(torch.cat(rows).mean(0))
        gaps[path] = float((means[0] - means[1]).abs().max() / means[0].abs().max())
    assert (max(gaps.values()) < 1e-4) == match, gaps
