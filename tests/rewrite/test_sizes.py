import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxopt.rewrite.sizes import (
    axis_of,
    fixed,
    same_shape,
    same_size,
    same_sizes,
    same_type,
    same_value,
)
from tests.graphs import Function, capture_module
from tests.rewrite.programs import aten, program_of


def symbolic():
    module = Function(lambda x, y: (x + 1, x.double(), y * 2, torch.cat((x, x), 1)))
    program = capture_module(
        module, torch.randn(2, 5, 4), torch.randn(3, 7, 4), dynamic={0: [0, 1], 1: [0, 1]}
    )
    return program.graph.output_node().args[0]


def test_symbols_are_equal_only_where_they_are_known_to_be():
    plus, double, other, twice = symbolic()
    assert same_shape(plus, double)
    assert not same_type(plus, double)
    assert not same_shape(plus, other)
    assert not same_shape(plus, twice)
    assert not same_size(plus.meta["val"].shape[1], 5)
    assert fixed(plus.meta["val"].shape[1]) is None
    assert fixed(plus.meta["val"].shape[2]) == 4


def test_a_symbol_that_the_model_fixed_is_a_number():
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    [size] = mode.from_tensor(torch.randn(8), symbolic_context=context).shape
    assert fixed(size) is None
    assert int(size) == 8  # what a model's Python code does when it needs the number
    assert isinstance(size, torch.SymInt)
    assert fixed(size) == 8
    assert same_size(size, 8)


def test_plain_numbers():
    assert same_sizes([1, 2], (1, 2))
    assert not same_sizes([1, 2], [1, 2, 3])
    assert same_value(3, 3)
    assert not same_value(3, 4)


def test_builder_asks_for_a_size_only_where_it_is_not_fixed():
    program = program_of(lambda b, x: b.call(aten.neg.default, x), torch.randn(3, 4))
    [node] = program.nodes()
    assert axis_of(node, -1) == 1
    assert fixed(node.meta["val"].shape[0]) == 3
