import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import activation
from fxopt.rewrite.driver import apply_rules
from tests.graphs import Function, count, operators, relative_error, run_float64
from tests.passes.canonicalize.rules import captured, rewrites

aten = torch.ops.aten
C = math.sqrt(2 / math.pi)
X = torch.randn(2, 5, 6)

TANH = {
    "gpt2": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "bloom": lambda x: x * 0.5 * (1.0 + torch.tanh(C * x * (1 + 0.044715 * x * x))),
    "products": lambda x: 0.5 * (x * (torch.tanh((x * x * x * 0.044715 + x) * C) + 1)),
    "half last": lambda x: (1 + torch.tanh(C * x + C * 0.044715 * x**3)) * x / 2,
    "of a product": lambda x: (lambda y: 0.5 * y * (1 + torch.tanh(C * (y + 0.044715 * y**3))))(
        x * x.sin()
    ),
}


def test_constants_written_to_the_precision_of_float32():
    # BLOOM writes sqrt(2 / pi) with eight digits.
    module = Function(
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
    )
    program = captured(module, X)
    before = program.clone()
    assert len(apply_rules(program, activation.RULES, "test")[0]) == 1
    assert relative_error(run_float64(program, [X]), run_float64(before, [X])) < 1e-9


ERF = {
    "bert": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "other order": lambda x: (1 + torch.erf(x * math.sqrt(0.5))) * x * 0.5,
    "halved": lambda x: (x / 2) * (torch.erf(x / 2**0.5) + 1),
}


@pytest.mark.parametrize("function", TANH.values(), ids=TANH.keys())
def test_tanh_gelu(function):
    program = captured(Function(function), X)
    rewrites(program, activation.RULES, [X * 3], 1)
    [node] = program.nodes(aten.gelu.default)
    assert node.kwargs == {"approximate": "tanh"}
    assert not operators(program)["aten.tanh.default"]


@pytest.mark.parametrize("function", ERF.values(), ids=ERF.keys())
def test_erf_gelu(function):
    program = captured(Function(function), X)
    rewrites(program, activation.RULES, [X * 3], 1)
    assert operators(program) == {"aten.gelu.default": 1}
    assert program.nodes(aten.gelu.default)[0].kwargs == {"approximate": "none"}


def test_silu():
    program = captured(Function(lambda x: torch.sigmoid(x) * x), X)
    rewrites(program, activation.RULES, [X], 1)
    assert operators(program) == {"aten.silu.default": 1}


@settings(max_examples=10, deadline=None)
@given(
    form=st.sampled_from([*ERF.values(), TANH["gpt2"], TANH["half last"]]),
    shape=st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size_and_dtype(form, shape, dtype):
    program = captured(Function(form), torch.randn(shape).to(dtype))
    rewrites(program, activation.RULES, [(torch.randn(1, 3, shape[-1]) * 4).to(dtype)], 1)
    assert count(program, aten.gelu.default) == 1


NEITHER = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "old erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421)),
    "other cubic": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0447 * x**3))),
    "whole": lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
    "minus": lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))),
    "plus two": lambda x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
    "another x": lambda x: 0.5 * x.sin() * (1 + torch.erf(x / math.sqrt(2))),
    "square": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2))),
    "alpha": lambda x: 0.5 * x * (1 + torch.tanh(C * torch.add(x, 0.044715 * x**3, alpha=2.0))),
    "floor": lambda x: torch.div(x, 2, rounding_mode="floor") * (1 + torch.erf(x / math.sqrt(2))),
    "gate": lambda x: x.sin() * torch.sigmoid(x),
}


@pytest.mark.parametrize("function", NEITHER.values(), ids=NEITHER.keys())
def test_look_alikes_are_left_alone(function):
    program = captured(Function(function), X)
    assert rewrites(program, activation.RULES, [X], 0) == []


def test_the_inner_value_may_have_other_readers():
    def forward(x):
        inner = torch.erf(x / math.sqrt(2))
        return 0.5 * x * (1 + inner), inner

    program = captured(Function(forward), X)
    rewrites(program, activation.RULES, [X], 1)
    assert operators(program)["aten.erf.default"] == 1
