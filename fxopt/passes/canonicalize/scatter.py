"""Write a tensor that is filled piece by piece as what it is filled with.

    y = empty; y[..., :n] = a; y[..., n:] = b   =   cat(a, b)

is what DeepSeek does to join the two parts of a key. The writes come here as `slice_scatter`.

Shapes: a [..., n]; b [..., m]; y [..., n + m], along any axis.
Exactness: bit-equal, no value is computed.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_type

aten = torch.ops.aten


class DropCopy(Rule):
    """`copy(x, source)` becomes `source`, which overwrites all of x."""

    def pattern(self, op: PatternOperators, x: Variable, source: Variable) -> Any:
        return op.copy(x, source, ...)

    def condition(self, program: Program, match: Match) -> bool:
        return same_type(match.source, match.root)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return match.source


class WriteScattersAsCat(Rule):
    """`slice_scatter(slice_scatter(y, a, 0, n), b, n)` becomes `cat([a, b])`."""

    def pattern(self, op: PatternOperators, y: Variable, a: Variable, b: Variable) -> Any:
        inner = op.named("inner", op.slice_scatter(y, a, ...))
        return op.slice_scatter(inner, b, ...)

    def condition(self, program: Program, match: Match) -> bool:
        first, second = _range(match.inner), _range(match.root)
        if first is None or second is None or first[0] != second[0]:
            return False
        size = fixed(shape_of(match.root)[first[0]])
        covers = first[1] == 0 and first[2] == second[1] and second[2] == size
        return covers and dtype_of(match.a) == dtype_of(match.b) == dtype_of(match.root)

    def rewrite(self, build: Builder, match: Match) -> Node:
        axis = axis_of(match.root, all_arguments(match.root)[2])
        return build.call(aten.cat.default, [match.a, match.b], axis)


def _range(node: Node) -> tuple[int, int, int] | None:
    """Axis, start and stop of a scatter with a known range of step one."""
    _, _, axis, start, stop, step = all_arguments(node)
    axis = axis_of(node, axis)
    size = fixed(shape_of(node)[axis])
    start = 0 if start is None else start
    stop = size if stop is None else stop
    if size is None or step != 1 or not isinstance(start, int) or not isinstance(stop, int):
        return None
    return axis, start, min(stop, size)


RULES = (DropCopy(), WriteScattersAsCat())
