import pytest
import torch

from fxopt.passes.canonicalize import scatter
from tests.graphs import operators
from tests.passes.canonicalize.rules import rewrites
from tests.rewrite.programs import program_of

aten = torch.ops.aten
A, B, Y = torch.randn(3, 2), torch.randn(3, 4), torch.randn(3, 6)


def test_a_copy_is_its_source():
    program = program_of(lambda b, x, y: b.call(aten.copy.default, x, y), Y, Y + 1)
    rewrites(program, scatter.RULES, [Y, Y + 1], 1)
    assert program.nodes() == []


@pytest.mark.parametrize("source", [torch.randn(1, 6), torch.randn(3, 6).double()])
def test_a_copy_that_broadcasts_or_casts_stays(source):
    program = program_of(lambda b, x, y: b.call(aten.copy.default, x, y), Y, source)
    rewrites(program, scatter.RULES, [Y, source], 0)


def scattered(first, second, axis=1):
    def build(b, y, a, c):
        inner = b.call(aten.slice_scatter.default, y, a, axis, *first)
        return b.call(aten.slice_scatter.default, inner, c, axis, *second)

    return build


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("stop", [6, 2**63 - 1, None])
def test_pieces_that_cover_everything_are_joined(axis, stop):
    program = program_of(scattered((0, 2), (2, stop), axis), Y, A, B)
    rewrites(program, scatter.RULES, [Y, A, B], 1)
    assert operators(program) == {"aten.cat.default": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 2), (1, 5)),  # a gap at the end and an overlap
        ((1, 3), (2, 6)),  # the first column is kept
        ((0, 4, 2), (2, 6)),  # every other column
        ((4, 6), (0, 4)),  # the wrong way round
    ],
)
def test_other_pieces_stay(first, second):
    program = program_of(scattered(first, second), Y, A, B)
    rewrites(program, scatter.RULES, [Y, A, B], 0)
