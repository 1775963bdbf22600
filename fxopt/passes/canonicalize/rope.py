"""Raise rotary position embedding to `fxopt::rope`.

    x * cos + rotate_half(x) * sin          =   rope(x, cos, sin, interleaved=False)
    x * cos + rotate_every_two(x) * sin     =   rope(x, cos, sin, interleaved=True)
    cat(rope(x[:R], cos, sin), x[R:])       =   rope(x, cos, sin), cos and sin R wide

with rotate_half((a, b)) = (-b, a) on halves and rotate_every_two the same on neighbours.

Shapes: x [..., D]; cos, sin [..., R] that broadcast against x, R <= D.
Exactness: bit-equal.
Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
    arXiv:2104.09864; the half-split order is GPT-NeoX's, the interleaved one GPT-J's.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_shape, same_size

aten = torch.ops.aten
fxopt = torch.ops.fxopt


class RaiseRope(Rule):
    """`x * cos + rotate(x) * sin` becomes `rope(x, cos, sin)`."""

    detail = "rope"

    def pattern(self, op: PatternOperators, x: Variable, cos: Variable, sin: Variable) -> list[Any]:
        first, second = op.named("first", op.slice(x, ...)), op.named("second", op.slice(x, ...))
        pair, axis = [op.neg(second), first], op.variable("axis")
        halves = op.cat(pair, axis)
        neighbours = op.reshape(op.named("stack", op.stack(pair, axis)), ...)
        return [op.add(op.mul(x, cos), op.mul(turned, sin)) for turned in (halves, neighbours)]

    def condition(self, program: Program, match: Match) -> bool:
        width = fixed(shape_of(match.x)[-1])
        if width is None or width % 2 or not same_shape(match.x, match.root):
            return False
        if not all(_spans(table, width) for table in (match.cos, match.sin)):
            return False
        bounds = _bounds_on_last_axis(match.first), _bounds_on_last_axis(match.second)
        rank = len(shape_of(match.x))
        if _is_interleaved(match):
            return match.axis in (-1, rank) and bounds == _neighbours(width)
        return match.axis in (-1, rank - 1) and bounds == _halves(width)

    def check(self, program: Program, match: Match) -> str | None:
        if dtype_of(match.cos) != dtype_of(match.sin):
            return "cos and sin have different dtypes"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(fxopt.rope.default, match.x, match.cos, match.sin, _is_interleaved(match))


class RaiseRopeOnHalves(Rule):
    """`cat(a cos - b sin, b cos + a sin)` becomes `rope(x, cat(cos, cos), cat(sin, sin))`.

    a and b are the halves of x, or its even and odd entries, which come out as halves.
    """

    detail = "rope"

    def pattern(self, op: PatternOperators, x: Variable, cos: Variable, sin: Variable) -> Any:
        first, second = op.named("first", op.slice(x, ...)), op.named("second", op.slice(x, ...))
        real = op.sub(op.mul(first, cos), op.mul(second, sin))
        imaginary = op.add(op.mul(second, cos), op.mul(first, sin))
        return op.cat([real, imaginary], op.variable("axis"))

    def condition(self, program: Program, match: Match) -> bool:
        width = fixed(shape_of(match.x)[-1])
        if width is None or not same_shape(match.x, match.root) or width % 2:
            return False
        if not all(_spans(table, width // 2) for table in (match.cos, match.sin)):
            return False
        bounds = _bounds_on_last_axis(match.first), _bounds_on_last_axis(match.second)
        return match.axis in (-1, len(shape_of(match.x)) - 1) and bounds in (
            _halves(width),
            _neighbours(width),
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        x, first = match.x, match.first
        if _bounds_on_last_axis(first) == _neighbours(fixed(shape_of(x)[-1]) or 0)[0]:
            x = build.call(aten.cat.default, [first, match.second], -1)
        cos, sin = (
            build.call(aten.cat.default, [table, table], -1) for table in (match.cos, match.sin)
        )
        return build.call(fxopt.rope.default, x, cos, sin, False)


class WidenPartialRope(Rule):
    """`cat(rope(x[..., :R], cos, sin), x[..., R:])` becomes `rope(x, cos, sin)`."""

    def pattern(self, op: PatternOperators, x: Variable, cos: Variable, sin: Variable) -> Any:
        turned, rest = op.named("turned", op.slice(x, ...)), op.named("rest", op.slice(x, ...))
        rope = op.call(fxopt.rope, turned, cos, sin, op.variable("interleaved"))
        return op.cat([op.named("rope", rope), rest], ...)

    def condition(self, program: Program, match: Match) -> bool:
        width, rotary = fixed(shape_of(match.x)[-1]), fixed(shape_of(match.cos)[-1])
        if width is None or rotary is None or not same_shape(match.x, match.root):
            return False
        bounds = _bounds_on_last_axis(match.turned), _bounds_on_last_axis(match.rest)
        return bounds == ((0, rotary, 1), (rotary, width, 1))

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.rope.users) > 1:
            return "the rotated part is read without the rest too"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(fxopt.rope.default, match.x, match.cos, match.sin, match.interleaved)


def _is_interleaved(match: Match) -> bool:
    """Whether the turned pairs are neighbours: they were stacked, not concatenated."""
    return "stack" in match.bindings


def _halves(width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (0, width // 2, 1), (width // 2, width, 1)


def _neighbours(width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (0, width, 2), (1, width, 2)


def _spans(table: Any, width: int) -> bool:
    return (
        isinstance(table, Node) and bool(shape_of(table)) and same_size(shape_of(table)[-1], width)
    )


def _bounds_on_last_axis(piece: Node) -> tuple[int, int, int] | None:
    """Start, stop and step of a slice of the last axis, None for any other slice."""
    x, axis, start, stop, step = all_arguments(piece)
    size = fixed(shape_of(x)[-1])
    if axis_of(x, axis) != len(shape_of(x)) - 1 or size is None:
        return None
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    return start, min(stop, size), step


RULES = (RaiseRope(), RaiseRopeOnHalves(), WidenPartialRope())
