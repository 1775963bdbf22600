import pytest
import torch

from fxopt.passes.canonicalize import einsum
from tests.graphs import Function, capture_module, operators
from tests.passes.canonicalize.rules import rewrites

SIZES = {"b": 2, "h": 3, "s": 5, "t": 4, "d": 6}


@pytest.mark.parametrize(
    "equation",
    ["bhsd,bhtd->bhst", "bshd,bthd->bhst", "bhst,bthd->bshd", "sd,dt->st", "bsd,btd->tbs"],
)
def test_contractions_become_matmul(equation: str):
    left, right = equation.split("->")[0].split(",")
    a, b = (torch.randn([SIZES[index] for index in term]) for term in (left, right))
    program = capture_module(Function(lambda a, b: torch.einsum(equation, a, b)), a, b, dynamic={})
    rewrites(program, einsum.RULES, [a, b], 1)
    assert operators(program)["aten.matmul.default"] == 1
    assert not operators(program)["aten.einsum.default"]


@pytest.mark.parametrize("equation", ["sd,td->std", "sd,sd->", "sds,td->t", "ij->ji", "a...,b->a"])
def test_other_equations_are_left_alone(equation: str):
    assert einsum.read_equation(equation) is None
