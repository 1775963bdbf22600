"""The loop over columns by itself: without the rows that keep what rounding to nearest gives."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.passes.quantization.compensation import Hessian, _Columns, hessian
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.grid import choose_grid, output_loss
from fxopt.passes.quantization.options import WeightOptions
from tests.graphs import signature_of
from tests.models import canonical_program
from tests.passes.quantization.test_gptq import options, problem, seeds
from tests.passes.quantization.test_quantize import as_sample, bert_batch, manager

DAMPING, HIGH = 0.01, 7
GROUPS = [{}, {"granularity": "group", "group_size": 4}]


def by_columns(
    weight: Tensor, chosen: WeightOptions, h: Hessian, static: bool, block_size: int = 5
) -> Tensor:
    span = chosen.block[1] if chosen.block[1] > 0 else weight.shape[1]
    whole = choose_grid(weight, chosen, output_loss(h.moments, chosen.block))
    fixed = whole if static or span == weight.shape[1] else None
    return _Columns(weight, chosen, h, fixed, span).run(block_size)[0]


@settings(max_examples=60, deadline=None)
@given(chosen=options, seed=seeds, act_order=st.booleans(), static=st.booleans())
def test_white_inputs_leave_nothing_to_make_up_for(chosen, seed, act_order, static):
    weight, _ = problem(seed)
    h = hessian([3 * torch.eye(24)], DAMPING, act_order)
    found = by_columns(weight, chosen, h, static or act_order, 16)
    assert torch.equal(found, choose_grid(weight, chosen).round(weight))


class OneByOne:
    """Optimal brain quantization as it is derived: the inverse anew for what is left, in float64.

    Attributes:
        margin: of each row, how near to a tie a rounding was: float32 may decide it otherwise.
    """

    def __init__(self, weight: Tensor, x: Tensor, span: int, symmetric: bool) -> None:
        self.weight = weight.double()
        self.w = weight.double().clone()
        self.span = span
        self.symmetric = symmetric
        self.margin = torch.full((len(weight),), torch.inf, dtype=torch.float64)
        moments = x.double().T @ x.double()
        self.moments = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))

    def run(self, order: list[int], static: bool) -> Tensor:
        for place, column in enumerate(order):
            if static or place % self.span == 0:
                first = column // self.span * self.span
                source = self.weight if static else self.w
                self.choose(source[:, first : first + self.span])
            left = order[place:]
            inverse = torch.linalg.inv(self.moments[left][:, left])
            rounded = self.round(self.w[:, column])
            error = (self.w[:, column] - rounded) / inverse[0, 0]
            self.w[:, left] -= error[:, None] * inverse[0]
            self.w[:, column] = rounded
        return self.w

    def choose(self, part: Tensor) -> None:
        self.zero = torch.zeros(len(part), dtype=torch.float64)
        if self.symmetric:
            self.scale = part.abs().amax(1) / HIGH
            return
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        self.scale = (high - low) / (2 * HIGH + 1)
        self.zero = -HIGH - 1 - (low / self.scale).round()

    def round(self, column: Tensor) -> Tensor:
        steps = column / self.scale
        self.margin = torch.minimum(self.margin, (steps - steps.floor() - 0.5).abs())
        low = -HIGH if self.symmetric else -HIGH - 1
        return ((steps.round() + self.zero).clamp(low, HIGH) - self.zero) * self.scale


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from(GROUPS),
    seed=seeds,
    order=st.sampled_from(["as they stand", "by energy"]),
    static=st.booleans(),
    symmetric=st.booleans(),
)
def test_it_is_what_one_column_at_a_time_gives(groups, seed, order, static, symmetric):
    act_order = order == "by energy"
    static = static or act_order
    weight, x = problem(seed, inputs=12)
    chosen = WeightOptions("int4", symmetric=symmetric, **groups)
    h = hessian([x], DAMPING, act_order)
    found = by_columns(weight, chosen, h, static)
    naive = OneByOne(weight, x, groups.get("group_size", 12), symmetric)
    expected = naive.run(h.order.tolist(), static or not groups)
    clear = naive.margin > 1e-3
    assume(bool(clear.any()))
    assert torch.allclose(found[clear].double(), expected[clear], rtol=1e-4, atol=1e-4)


def test_a_hessian_that_no_damping_mends_is_an_error():
    _, x = problem(0, tokens=3)
    with pytest.raises(CalibrationError, match="24 inputs have a Hessian that is not positive"):
        hessian([x], 1e-30, True)


def few_tokens(damping: float):
    program = canonical_program("bert")
    return program, manager([as_sample(program, bert_batch(1, 4, 0))]), Gptq(damping=damping)


def test_on_a_program_the_error_names_the_linear_and_nothing_is_rounded():
    program, passes, gptq = few_tokens(1e-30)
    before, values = signature_of(program), {k: v.clone() for k, v in program.weights().items()}
    with pytest.raises(CalibrationError, match=r"(?s)\w+\.\w+.*not positive definite"):
        passes.run(program, [gptq])
    assert signature_of(program) == before
    assert all(torch.equal(program.weight(name), value) for name, value in values.items())


def test_on_a_program_more_damping_than_was_asked_for_is_said():
    program, passes, gptq = few_tokens(1e-9)
    record = passes.run(program, [gptq]).history[-1]
    assert any("damping" in note and "positive definite" in note for note in record.notes)
