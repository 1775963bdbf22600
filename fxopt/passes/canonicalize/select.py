"""Write one part of a fused projection as a slice of it.

    reshape(y, [..., n, m])[..., i, :]   =   y[..., m i : m (i + 1)]

so that the queries, keys and values of a fused projection are ranges of its output axis.

Shapes: y [..., n m]; the part [..., m], where m may be several axes.
Exactness: bit-equal, no value is computed.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import math
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, shape_of
from fxopt.passes.canonicalize.views import permutation, permute
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_sizes

aten = torch.ops.aten


class DropUnitAxis(Rule):
    """`squeeze(permute(unsqueeze(x)))` becomes `permute(x)` if the two mean the same axis."""

    def pattern(self, op: PatternOperators, moved: Variable, axis: Variable) -> Any:
        return op.squeeze(moved, axis)

    def condition(self, program: Program, match: Match) -> bool:
        source, order = permutation(match.moved)
        if source.target is not aten.unsqueeze.default or not isinstance(match.axis, int):
            return False
        return order[axis_of(match.moved, match.axis)] == axis_of(source, argument(source, "dim"))

    def rewrite(self, build: Builder, match: Match) -> Node:
        source, order = permutation(match.moved)
        unit = axis_of(source, argument(source, "dim"))
        kept = [axis - (axis > unit) for axis in order if axis != unit]
        return permute(build, source.all_input_nodes[0], kept)


class SelectBeforePermuting(Rule):
    """`permute(x)[i]` becomes `permute(x[..., i, ...])`."""

    def pattern(
        self, op: PatternOperators, moved: Variable, axis: Variable, index: Variable
    ) -> Any:
        return op.select(moved, axis, index)

    def condition(self, program: Program, match: Match) -> bool:
        return permutation(match.moved)[0] is not match.moved

    def rewrite(self, build: Builder, match: Match) -> Node:
        source, order = permutation(match.moved)
        chosen = order.pop(axis_of(match.moved, match.axis))
        part = build.call(aten.select.int, source, chosen, match.index)
        return permute(build, part, [axis - (axis > chosen) for axis in order])


class WriteSelectAsSlice(Rule):
    """`reshape(y, [..., n, m])[..., i, :]` becomes a slice of y."""

    def pattern(self, op: PatternOperators, y: Variable, axis: Variable, index: Variable) -> Any:
        return op.select(op.named("parts", op.reshape(y, ...)), axis, index)

    def condition(self, program: Program, match: Match) -> bool:
        whole, parts = shape_of(match.y), shape_of(match.parts)
        axis = axis_of(match.parts, match.axis)
        known = all(fixed(size) is not None for size in parts[axis:])
        return known and axis == len(whole) - 1 and same_sizes(whole[:-1], parts[:axis])

    def rewrite(self, build: Builder, match: Match) -> Node:
        axis = axis_of(match.parts, match.axis)
        count, *rest = (fixed(size) or 0 for size in shape_of(match.parts)[axis:])
        width, index = math.prod(rest), match.index % count
        bounds = width * index, width * (index + 1)
        part = build.call(aten.slice.Tensor, match.y, axis, *bounds)
        sizes = [*(build.size(match.y, leading) for leading in range(axis)), *rest]
        return build.call(aten.reshape.default, part, sizes)


RULES = (DropUnitAxis(), SelectBeforePermuting(), WriteSelectAsSlice())
