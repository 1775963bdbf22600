import torch

from fxopt.passes.canonicalize.subexpressions import merge_equal
from tests.graphs import Function, assert_equivalent, capture_module, operators

X = torch.randn(2, 5, 4)


def merge(function, *tensors, **options):
    program = capture_module(Function(function), *(tensors or (X,)), **options)
    before = program.clone()
    merged = merge_equal(program)
    program.graph.lint()
    program.graph_module.recompile()
    return merged, program, before


def test_equal_calls_are_merged_from_the_leaves_up():
    merged, program, before = merge(lambda x: (x.sin() + 1).exp() * (x.sin() + 1).exp())
    assert merged == 3
    assert operators(program)["aten.exp.default"] == 1
    assert_equivalent(program, before, [torch.randn(1, 3, 4)])
    assert merge_equal(program) == 0


def test_different_arguments_are_different_calls():
    merged, _, _ = merge(lambda x: (x.sum(0), x.sum(1), x.sum(1, keepdim=True)))
    assert merged == 0


def test_one_and_true_and_one_point_zero_are_different():
    ints = torch.arange(12).reshape(1, 3, 4)
    merged, program, _ = merge(lambda x: (x + 1, x + 1.0, x + True), ints, dynamic={})
    assert merged == 0
    assert [node.meta["val"].dtype for node in program.nodes()][:2] == [torch.int64, torch.float32]


def test_zero_and_minus_zero_are_different():
    merged, _, _ = merge(lambda x: (x.fmod(2.0) / 0.0, x.fmod(2.0) / -0.0))
    assert merged == 1  # fmod only


def test_random_numbers_are_never_merged():
    merged, program, _ = merge(lambda x: torch.rand_like(x) - torch.rand_like(x))
    assert merged == 0
    assert operators(program)["aten.rand_like.default"] == 2


def test_one_size_is_asked_for_once():
    def forward(x, y):
        z = x + y
        return z.reshape(z.shape[0] * z.shape[1], 4), x.reshape(x.shape[1], -1)

    merged, program, before = merge(forward, X, X, dynamic={0: [0, 1], 1: [0, 1]})
    sizes = program.nodes(torch.ops.aten.sym_size.int)
    assert len(sizes) == len({str(node.meta["val"]) for node in sizes})
    assert_equivalent(program, before, [X, X])
    del merged
