import math

import pytest
import torch

from fxopt.passes.canonicalize import constants
from fxopt.passes.canonicalize.constants import fold_constants, number_of
from fxopt.passes.canonicalize.functional import make_functional
from tests.graphs import Function, assert_equivalent, capture_module, operators, signature_of
from tests.passes.canonicalize.rules import canonical, rewrites

aten = torch.ops.aten
X = torch.randn(2, 5, 4)


def fold(function, **parameters):
    program = capture_module(Function(function, **parameters), X)
    before = program.clone()
    folded = fold_constants(program, "test")
    program.graph.lint()
    program.graph_module.recompile()
    assert_equivalent(program, before, [torch.randn(3, 6, 4)])
    assert fold_constants(program, "test") == 0
    return folded, program


def test_tables_of_integers_are_folded():
    folded, program = fold(lambda x: x + (torch.arange(4) * 3).clamp(max=7).float())
    assert folded == 3
    assert operators(program)["aten.add.Tensor"] == 1
    [name] = [name for name in program.weights() if name != "x"][-1:]
    assert name.startswith("constants.")
    assert torch.equal(program.weight(name), torch.tensor([0.0, 3.0, 6.0, 7.0]))


def test_exact_powers_are_folded_and_rounded_ones_are_not():
    folded, program = fold(lambda x: x * torch.pow(2.0, -torch.arange(4).float()))
    assert operators(program)["aten.pow.Scalar"] == 0
    assert folded
    _, program = fold(lambda x: x * torch.pow(10.0, -torch.arange(4).float()))
    assert operators(program)["aten.pow.Scalar"] == 1


def test_parameters_stay():
    folded, program = fold(lambda x, w: x * (w.t() + 1).sum(0), w=torch.ones(4, 4))
    assert folded == 0
    assert set(program.weights()) == {"w"}


def test_large_results_stay():
    folded, _ = fold(lambda x: x + torch.arange(4).repeat(2**18).sum())
    assert folded == 0


def test_growth_is_limited():
    folded, program = fold(lambda x: x + torch.arange(64).expand(64, 64).float().sum())
    assert operators(program)["aten.expand.default"] == 1
    assert folded == 0


def test_symbolic_sizes_and_random_numbers_stay():
    assert fold(lambda x: x + torch.arange(x.shape[1])[:, None] * 2)[0] == 0
    program = capture_module(Function(lambda x: x + torch.rand(4) * 2), X)
    assert fold_constants(program, "test") == 0


def test_literals_are_folded():
    module = Function(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    program = capture_module(module, X)
    canonical(program, [X])
    assert operators(program) == {"aten.mul.Tensor": 1}


def functional_program(function):
    program = capture_module(Function(function), X)
    make_functional(program, "test")
    return program


SCALARS = {
    "mul": lambda x: x * torch.sqrt(torch.tensor(8.0)),
    "div": lambda x: x / torch.sqrt(torch.tensor(8.0)),
    "add": lambda x: torch.tensor(0.1) + x,
    "sub": lambda x: x - torch.tensor(0.1) * 3,
    "where": lambda x: torch.where(x > 0, x, torch.tensor(-1e4)),
    "masked_fill": lambda x: x.masked_fill(x > 0, torch.tensor(-1e4)),
}


@pytest.mark.parametrize("function", SCALARS.values(), ids=SCALARS.keys())
def test_scalars_become_numbers(function):
    program = functional_program(function)
    fold_constants(program, "test")
    rewrites(program, constants.RULES, [X], 1)
    canonical(program, [X])
    assert not [name for name in program.weights() if "constants" in name]


def test_a_number_is_computed_in_float64():
    program = functional_program(SCALARS["mul"])
    fold_constants(program, "test")
    [node] = program.nodes(aten.mul.Tensor)
    # Vectorized square roots may be the neighbouring number.
    assert number_of(program, node.args[1]) == pytest.approx(math.sqrt(8), rel=2**-51, abs=0)


def test_a_scalar_parameter_is_no_number():
    program = capture_module(Function(lambda x, s: x * s.exp(), s=torch.tensor(2.0)), X)
    before = signature_of(program)
    rewrites(program, constants.RULES, [X], 0)
    assert signature_of(program) == before


def test_a_scalar_that_promotes_stays_a_tensor():
    module = Function(lambda x: x.to(torch.int64) * torch.tensor(2.5, dtype=torch.float64))
    program = capture_module(module, X)
    canonical(program, [X])
    [node] = program.nodes(aten.mul.Tensor)
    assert node.meta["val"].dtype == torch.float64
