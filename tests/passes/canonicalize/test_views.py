import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import select, views
from tests.graphs import Function, capture_module, operators
from tests.passes.canonicalize.rules import canonical, rewrites

aten = torch.ops.aten


@settings(max_examples=15, deadline=None)
@given(orders=st.lists(st.permutations(range(4)), min_size=1, max_size=4))
def test_permutations_in_a_row_become_one(orders):
    x = torch.randn(2, 3, 4, 5)

    def forward(x):
        y = x
        for order in orders:
            y = y.permute(order)
        return torch.sin(y)

    program = capture_module(Function(forward), x)
    canonical(program, [x])
    moved = [node for node in program.nodes() if node.target is not aten.sin.default]
    y = x
    for order in orders:
        y = y.permute(order)
    assert len(moved) == (0 if y.stride() == x.stride() else 1)


FORMS = {
    "t": (lambda x: x.t(), (3, 4), aten.t.default),
    "T": (lambda x: x.T, (3, 4), aten.t.default),
    "mT": (lambda x: x.mT, (2, 3, 4), aten.transpose.int),
    "transpose": (lambda x: x.transpose(-1, -2), (2, 3, 4), aten.transpose.int),
    "permute": (lambda x: x.permute(0, -1, 1), (2, 3, 4), aten.transpose.int),
    "swapaxes": (lambda x: x.swapaxes(2, 0), (2, 3, 4), aten.transpose.int),
    "movedim": (lambda x: x.movedim(0, -1), (2, 3, 4), aten.permute.default),
}


@pytest.mark.parametrize(("function", "shape", "target"), FORMS.values(), ids=FORMS.keys())
def test_a_permutation_has_one_form(function, shape, target):
    x = torch.randn(shape)
    program = capture_module(Function(lambda x: torch.sin(function(x))), x, dynamic={})
    canonical(program, [x])
    assert [node.target for node in program.nodes()] == [target, aten.sin.default]
    assert all(axis >= 0 for axis in program.nodes()[0].args[1:] if isinstance(axis, int))


RESHAPES = {
    "view": lambda x: x.view(x.shape[0], x.shape[1], 2, 4),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2, 4),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten rest": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "flatten unflatten": lambda x: x.flatten(1).unflatten(1, (-1, 8)).flatten(-2),
}


@pytest.mark.parametrize("function", RESHAPES.values(), ids=RESHAPES.keys())
def test_every_change_of_shape_is_one_reshape(function):
    x = torch.randn(2, 5, 8)
    program = capture_module(Function(lambda x: torch.sin(function(x))), x)
    canonical(program, [torch.randn(3, 7, 8)])
    counts = operators(program)
    assert counts.pop("aten.sin.default") == 1
    assert counts in ({"aten.reshape.default": 1}, {})


SPLITS = {
    "chunk": lambda x: x.chunk(3, -1),
    "split": lambda x: x.split(2, 2),
    "split sizes": lambda x: x.split([1, 2, 3], -1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, -1),
}


@pytest.mark.parametrize("function", SPLITS.values(), ids=SPLITS.keys())
def test_parts_are_slices(function):
    x = torch.randn(2, 5, 6)
    program = capture_module(Function(lambda x: [part.sin() for part in function(x)]), x)
    rewrites(program, [views.WriteSplitAsSlices()], [x], 3)
    assert operators(program) == {"aten.slice.Tensor": 3, "aten.sin.default": 3}


def test_unbind_is_a_selection():
    x = torch.randn(2, 3, 6)
    program = capture_module(
        Function(lambda x: [part.sin() for part in x.unbind(1)]), x, dynamic={0: [0]}
    )
    rewrites(program, [views.WriteSplitAsSlices()], [x], 3)
    assert operators(program) == {"aten.select.int": 3, "aten.sin.default": 3}


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (lambda x: x[..., :-2], (2, 0, 4)),
        (lambda x: x[..., -2:], (2, 4, views.TO_THE_END)),
        (lambda x: x[..., 1:99], (2, 1, views.TO_THE_END)),
        (lambda x: x[..., 1::2], (2, 1, views.TO_THE_END, 2)),
        (lambda x: x[..., -12:-2], (2, 0, 4)),  # past the front
        (lambda x: x[..., :-9], (2, 0, 0)),
        (lambda x: x[:, -2:], (1, -2, views.TO_THE_END)),  # the size is not known: left alone
    ],
)
def test_bounds_of_a_slice_have_one_form(function, bounds):
    x = torch.randn(2, 5, 6)
    program = capture_module(Function(lambda x: function(x).sin()), x)
    canonical(program, [x])
    [node] = program.nodes(aten.slice.Tensor)
    assert node.args[1:] == bounds


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("rest", [(8,), (2, 4)])
def test_a_part_of_a_fused_projection_is_a_slice(part: int, rest: tuple[int, ...]):
    x = torch.randn(2, 5, 24)
    program = capture_module(
        Function(lambda x: x.view(x.shape[0], x.shape[1], 3, *rest).select(2, part).sin()), x
    )
    canonical(program, [torch.randn(1, 3, 24)])
    [node] = program.nodes(aten.slice.Tensor)
    assert node.args[1:3] == (2, 8 * part)
    assert not program.nodes(aten.select.int)


def test_a_part_between_heads_stays_a_selection():
    x = torch.randn(2, 5, 24)
    program = capture_module(
        Function(lambda x: x.view(x.shape[0], x.shape[1], 4, 3, 2).select(3, 1).sin()), x
    )
    canonical(program, [x])
    assert len(program.nodes(aten.select.int)) == 1


def test_the_packed_projection_of_multihead_attention():
    # What nn.MultiheadAttention does to its packed input projection.
    def forward(x):
        packed = x.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        return packed[0].sin(), packed[1].cos(), packed[2].exp()

    x = torch.randn(2, 5, 24)
    program = capture_module(Function(forward), x)
    canonical(program, [torch.randn(4, 1, 24)])
    assert operators(program)["aten.slice.Tensor"] == 3
    assert sum(operators(program).values()) == 6


def test_select_moves_before_a_permutation():
    x = torch.randn(2, 5, 6)
    program = capture_module(Function(lambda x: x.permute(2, 0, 1)[1].sin()), x)
    rewrites(program, [select.SelectBeforePermuting()], [x], 1)
    assert program.nodes(aten.select.int)[0].args[1:] == (2, 1)


def test_a_widening_cast_moves_behind_a_permutation():
    x = torch.randn(2, 5, 6).bfloat16()
    program = capture_module(Function(lambda x: x.float().transpose(1, 2).sin()), x)
    rewrites(program, [views.PermuteBeforeWidening()], [x], 1)
    assert [node.target for node in program.nodes()] == [
        aten.transpose.int,
        aten.to.dtype,
        aten.sin.default,
    ]


def test_a_rounding_cast_stays_before_a_permutation():
    x = torch.randn(2, 5, 6)
    program = capture_module(Function(lambda x: x.bfloat16().transpose(1, 2).sin()), x)
    assert rewrites(program, [views.PermuteBeforeWidening()], [x], 0) == []
