import pytest
import torch

from fxopt.passes.base import Context
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.canonicalize.functional import is_mutable, make_functional, twin
from tests.graphs import Function, assert_equivalent, capture_module, run, signature_of
from tests.rewrite.programs import program_of

aten = torch.ops.aten


def add_then_read(x):
    y = x.sin()
    y.add_(1)
    return y * 2


def view_of_the_result(x):
    y = x.sin()
    y.mul_(3)
    return y[:, 1:] + 1


def twice(x):
    y = x.sin()
    y.add_(1)
    y.mul_(y)
    return y.cos()


def keeps_dtype(x):
    y = (x > 0).float().bfloat16()
    y.add_(torch.ones(4) / 3)
    return y.float()


def fill(x):
    y = torch.zeros_like(x)
    y.masked_fill_(x > 0, -torch.inf)
    return torch.exp(y)


def part_of_a_fresh_tuple(x):
    values, index = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values * 2, index


FUNCTIONAL = [add_then_read, view_of_the_result, twice, keeps_dtype, fill, part_of_a_fresh_tuple]


@pytest.mark.parametrize("function", FUNCTIONAL)
def test_writes_become_results(function):
    x = torch.randn(2, 5, 4)
    program = capture_module(Function(function), x)
    assert any(is_mutable(node) for node in program.nodes())
    before = program.clone()
    sites, refusals = make_functional(program, "test")
    assert sites
    assert refusals == []
    assert not any(is_mutable(node) for node in program.nodes())
    program.graph.lint()
    assert_equivalent(program, before, [torch.randn(3, 6, 4)])
    assert make_functional(program, "test") == ([], [])


def built_writes_through_a_slice(b, x):
    y = b.call(aten.sin.default, x)
    part = b.call(aten.slice.Tensor, y, 1, 1, 3)
    b.call(aten.add_.Tensor, part, 1)
    return b.call(aten.mul.Tensor, y, 2)


def built_writes_through_two_views(b, x):
    y = b.call(aten.sin.default, x)
    row = b.call(aten.select.int, y, 0, 1)
    part = b.call(aten.slice.Tensor, row, 0, 0, 2)
    written = b.call(aten.mul_.Tensor, part, 5)
    later = b.call(aten.select.int, y, 0, 1)
    return [b.call(aten.cos.default, later), b.call(aten.exp.default, y), written]


@pytest.mark.parametrize("build", [built_writes_through_a_slice, built_writes_through_two_views])
def test_a_write_through_a_view_is_put_back(build):
    x = torch.randn(3, 4)
    program = program_of(build, x)
    expected = run(program, [x])
    sites, refusals = make_functional(program, "test")
    assert (len(sites), refusals) == (1, [])
    assert not any(is_mutable(node) for node in program.nodes())
    program.graph.lint()
    for ours, theirs in zip(run(program, [x]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def reads_an_old_view(b, x):
    y = b.call(aten.sin.default, x)
    part = b.call(aten.slice.Tensor, y, 1, 1, 3)
    b.call(aten.add_.Tensor, y, 1)
    return b.call(aten.mul.Tensor, part, 2)


def writes_through_a_reshape(b, x):
    y = b.call(aten.sin.default, x)
    flat = b.call(aten.view.default, y, [-1])
    b.call(aten.add_.Tensor, flat, 1)
    return b.call(aten.mul.Tensor, y, 2)


def writes_to_an_input(b, x):
    return b.call(aten.mul.Tensor, b.call(aten.add_.Tensor, x, 1), 2)


def writes_to_a_weight(b, x):
    weight = b.weight("weight", torch.ones(4))
    return b.call(aten.mul.Tensor, b.call(aten.add_.Tensor, weight, 1), x)


def random(b, x):
    return b.call(aten.uniform_.default, b.call(aten.sin.default, x))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (reads_an_old_view, "through a view"),
        (writes_through_a_reshape, "writes through a aten.view"),
        (writes_to_an_input, "writes to an input"),
        (writes_to_a_weight, "writes to a weight"),
        (random, "has no twin"),
    ],
)
def test_refusals(build, reason: str):
    program = program_of(build, torch.randn(3, 4))
    before = signature_of(program)
    sites, refusals = make_functional(program, "test")
    assert sites == []
    assert reason in refusals[0].reason
    assert signature_of(program) == before
    # Nothing else may be done to a program that writes to memory in unknown ways.
    result = Canonicalize().run(program, Context())
    assert result.sites == ()
    assert [refusal.reason for refusal in result.refusals] == [refusals[0].reason]
    assert signature_of(program) == before


def test_twins():
    assert twin(aten.add_.Tensor) is aten.add.Tensor
    assert twin(aten.masked_fill_.Scalar) is aten.masked_fill.Scalar
    assert twin(aten.uniform_.default) is None
    assert twin(aten.add.out) is None
