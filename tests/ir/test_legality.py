"""What `check_program` says of recorded shapes."""

import pytest
import torch

from fxopt.errors import IllegalGraphError
from fxopt.ir.legality import check_program
from fxopt.ir.program import Program
from fxopt.lowering.gate import size_at
from tests.graphs import Function, capture_module

aten = torch.ops.aten


def counted() -> Program:
    """A program in which a size depends on the values of its input."""
    return capture_module(Function(lambda x: x.nonzero().float().sin()), torch.randn(3, 4))


def test_a_size_that_depends_on_values_is_legal():
    program = counted()
    check_program(program)
    [node] = program.nodes(aten.sin.default)
    assert node.meta["val"].shape[0].node.hint is None
    assert node.meta["val"].shape[1] == 2


def test_what_is_known_beside_it_is_still_checked():
    program = counted()
    [node] = program.nodes(aten.sin.default)
    for wrong in (torch.empty(5, 2), node.meta["val"][:, :1], node.meta["val"].double()):
        node.meta["val"] = wrong
        with pytest.raises(IllegalGraphError, match=r"'sin' \(aten.sin.default\) records"):
            check_program(program)


def test_the_speed_gate_takes_it_for_a_length():
    program = counted()
    [node] = program.nodes(aten.sin.default)
    assert [size_at(size, program, (3, 17)) for size in node.meta["val"].shape] == [17, 2]
