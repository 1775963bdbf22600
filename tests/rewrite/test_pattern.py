import operator

import pytest
import torch
from torch.fx import Node

from fxopt.rewrite.pattern import (
    Match,
    PatternOperators,
    Variable,
    all_arguments,
    argument,
    match,
    matches,
    root_packets,
)
from tests.rewrite.programs import aten, program_of

op = PatternOperators()
X = torch.randn(3, 4)
x, y, z = Variable("x"), Variable("y"), Variable("z")


def root(function, *inputs: torch.Tensor) -> Node:
    program = program_of(function, *(inputs or (X, X)))
    return program.graph.output_node().args[0][0]


def test_binds_variables_to_nodes_and_numbers():
    node = root(lambda b, p, q: b.call(aten.add.Tensor, b.call(aten.mul.Tensor, p, 2.0), q))
    found = match(op.add(op.mul(x, y), z), node)
    assert isinstance(found, Match)
    assert (found.x.name, found.y, found.z.name) == ("x0", 2.0, "x1")
    assert found.root is node


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", ["add", "mul", "maximum"])
def test_commutative_operators_match_in_either_order(name: str, swap: bool):
    target = {"add": aten.add.Tensor, "mul": aten.mul.Tensor, "maximum": aten.maximum.default}[name]

    def build(b, p, q):
        inner = b.call(aten.neg.default, p)
        return b.call(target, q, inner) if swap else b.call(target, inner, q)

    found = match(getattr(op, name)(op.neg(x), y), root(build))
    assert found is not None
    assert (found.x.name, found.y.name) == ("x0", "x1")


def test_subtraction_matches_in_one_order_only():
    node = root(lambda b, p, q: b.call(aten.sub.Tensor, q, b.call(aten.neg.default, p)))
    assert match(op.sub(op.neg(x), y), node) is None
    assert match(op.sub(y, op.neg(x)), node) is not None


def test_a_repeated_variable_binds_one_value():
    same = root(lambda b, p, q: b.call(aten.mul.Tensor, p, b.call(aten.sigmoid.default, p)))
    other = root(lambda b, p, q: b.call(aten.mul.Tensor, p, b.call(aten.sigmoid.default, q)))
    assert match(op.mul(x, op.sigmoid(x)), same) is not None
    assert match(op.mul(x, op.sigmoid(x)), other) is None


def test_a_repeated_variable_steers_the_operand_order():
    # Only the swapped order of the outer sum lets x be the same node twice.
    def build(b, p, q):
        product = b.call(aten.mul.Tensor, p, q)
        return b.call(aten.add.Tensor, b.call(aten.neg.default, p), product)

    assert match(op.add(op.mul(x, y), op.neg(x)), root(build)) is not None


def test_matches_yields_every_operand_order():
    node = root(lambda b, p, q: b.call(aten.add.Tensor, p, q))
    assert [(m.x.name, m.y.name) for m in matches(op.add(x, y), node)] == [
        ("x0", "x1"),
        ("x1", "x0"),
    ]


@pytest.mark.parametrize("casts", [0, 1, 2, 3])
def test_cast_is_optional_and_at_most_double(casts: int):
    def build(b, p, q):
        value = p
        for dtype in (torch.float64, torch.float32, torch.float64)[:casts]:
            value = b.call(aten.to.dtype, value, dtype)
        return b.call(aten.neg.default, value)

    found = match(op.neg(op.cast(op.variable("x", lambda v: v.op == "placeholder"))), root(build))
    assert (found is not None) == (casts <= 2)


def test_either_takes_the_first_that_fits():
    node = root(lambda b, p, q: b.call(aten.pow.Tensor_Scalar, p, 2))
    pattern = op.either(op.mul(x, x), op.pow(x, 2))
    assert match(pattern, node) is not None
    assert root_packets(pattern) == {aten.mul, aten.pow}
    assert match(op.either(op.mul(x, x), op.pow(x, 3)), node) is None


def test_omitted_arguments_must_have_their_default():
    plain = root(lambda b, p, q: b.call(aten.add.Tensor, p, q))
    scaled = root(lambda b, p, q: b.call(aten.add.Tensor, p, q, alpha=2))
    assert match(op.add(x, y), plain) is not None
    assert match(op.add(x, y), scaled) is None
    assert match(op.add(x, y, ...), scaled) is not None


def test_missing_optional_arguments_match_none():
    node = root(lambda b, p, q: b.call(aten.linear.default, p, q))
    assert match(op.linear(x, y, None), node) is not None
    found = match(op.linear(x, y, z), node)
    assert found is not None
    assert found.z is None


def test_numbers_match_by_value_and_booleans_by_identity():
    node = root(lambda b, p, q: b.call(aten.pow.Tensor_Scalar, p, 2.0))
    assert match(op.pow(x, 2), node) is not None
    mean = root(lambda b, p, q: b.call(aten.mean.dim, p, [1], True))
    assert match(op.mean(x, [1], True), mean) is not None
    assert match(op.mean(x, [1], 1), mean) is None
    assert match(op.mean(x, [0], True), mean) is None


def test_a_condition_on_a_variable():
    node = root(lambda b, p, q: b.call(aten.mul.Tensor, p, 3.0))
    number = op.variable("n", lambda value: isinstance(value, float))
    assert match(op.mul(x, number), node) is not None
    assert match(op.mul(op.variable("n", lambda value: value == 4), x), node) is None


def test_lists_match_element_by_element():
    node = root(lambda b, p, q: b.call(aten.cat.default, [p, q], 1))
    found = match(op.cat([x, y], 1), node)
    assert found is not None
    assert found.y.name == "x1"
    assert match(op.cat([x], 1), node) is None


def test_named_calls_and_operators_outside_aten():
    def build(b, p, q):
        return b.call(torch.ops.fxopt.rope.default, b.call(aten.neg.default, p), q, q, False)

    pattern = op.call(torch.ops.fxopt.rope, op.named("turned", op.neg(x)), y, y, False)
    found = match(pattern, root(build))
    assert found is not None
    assert found.turned.target is aten.neg.default
    with pytest.raises(AttributeError):
        _ = found.absent


def test_python_functions_can_be_matched():
    def build(b, p, q):
        return b.call(operator.getitem, b.call(aten.split.Tensor, p, 2, 1), 1)

    found = match(op.call(operator.getitem, op.split(x, 2, 1), y), root(build))
    assert found is not None
    assert found.y == 1


def test_arguments_by_name_and_default():
    node = root(lambda b, p, q: b.call(aten.layer_norm.default, p, [4], eps=1e-3))
    assert argument(node, "eps") == 1e-3
    assert argument(node, "weight") is None
    assert all_arguments(node)[1:] == ([4], None, None, 1e-3, True)
    with pytest.raises(KeyError):
        argument(node, "absent")
