"""Drop what computes nothing, and write every dtype conversion in one way.

    x + 0 = x * 1 = x / 1 = x ** 1 = x
    cast(cast(x, wider), dtype) = cast(x, dtype)

Shapes: x [...] -> x [...]; the strides of a result may differ from the model's.
Exactness: equal over the reals, and bit-equal but for the sign of zero.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.canonicalize.results import is_result_copy
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_type

aten = torch.ops.aten

# What a program without in-place operators can do without, written on `x`.
_NOTHING: tuple[Callable[[PatternOperators, Any], Any], ...] = (
    lambda op, x: op.dropout(x, ..., False),  # at inference, dropout(x) = x
    lambda op, x: op.dropout(x, 0.0, ...),
    lambda op, x: op.alpha_dropout(x, ..., False),
    lambda op, x: op.feature_dropout(x, ..., False),
    lambda op, x: op.feature_alpha_dropout(x, ..., False),
    lambda op, x: op.contiguous(x, ...),  # reshape copies by itself where it must
    lambda op, x: op.clone(x, ...),  # nothing in the graph writes; results.py sees to the caller
    lambda op, x: op.detach(x),
    lambda op, x: op.detach_(x),
    lambda op, x: op.alias(x),
    lambda op, x: op.lift_fresh(x),
    lambda op, x: op.lift_fresh_copy(x),
    lambda op, x: op.positive(x),
    lambda op, x: op.to(x, ...),
    lambda op, x: op._to_copy(x, ...),
    lambda op, x: op.type_as(x, ...),
    lambda op, x: op.expand(x, ...),
    lambda op, x: op.expand_as(x, ...),
    lambda op, x: op.repeat(x, ...),
    lambda op, x: op.slice(x, ...),  # a slice of full size takes everything
    lambda op, x: op.reshape(x, ...),
    lambda op, x: op.cat([x], ...),
    lambda op, x: op.mul(x, 1),  # x * 1 = x
    lambda op, x: op.div(x, 1),  # x / 1 = x
    lambda op, x: op.add(x, 0, ...),  # x + 0 = x
    lambda op, x: op.sub(x, 0, ...),  # x - 0 = x
    lambda op, x: op.pow(x, 1),  # x ** 1 = x
)


class DropNoOperation(Rule):
    """A call that returns its first argument becomes that argument."""

    def pattern(self, op: PatternOperators, x: Variable) -> list[Any]:
        return [entry(op, x) for entry in _NOTHING]

    def condition(self, program: Program, match: Match) -> bool:
        # Same shape, dtype and device: a sum with 0 may still broadcast or promote.
        return same_type(match.x, match.root) and not (
            _skips(match.root) or is_result_copy(match.root)
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        return match.x


def _skips(node: Node) -> bool:
    return node.target is aten.slice.Tensor and argument(node, "step") != 1


class WriteCastAsTo(Rule):
    """Every form of dtype conversion becomes `aten.to.dtype(x, dtype)`."""

    def pattern(self, op: PatternOperators, x: Variable) -> list[Any]:
        return [op.to(x, ...), op._to_copy(x, ...), op.type_as(x, ...)]

    def condition(self, program: Program, match: Match) -> bool:
        plain = len(match.root.args) == 2 and not match.root.kwargs
        if match.root.target is aten.to.dtype and plain:
            return False
        return match.x.meta["val"].device == match.root.meta["val"].device

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.to.dtype, match.x, dtype_of(match.root))


class MergeCasts(Rule):
    """`to(to(x, wider), dtype)` becomes `to(x, dtype)`; a cast that rounds is kept."""

    def pattern(self, op: PatternOperators, x: Variable) -> Any:
        return op.to(op.named("inner", op.to(x, ...)), ...)

    def condition(self, program: Program, match: Match) -> bool:
        casts = match.root.target is aten.to.dtype and match.inner.target is aten.to.dtype
        return casts and holds_every_value(dtype_of(match.inner), dtype_of(match.x))

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.to.dtype, match.x, dtype_of(match.root))


def holds_every_value(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Whether a dtype represents every value of another exactly."""
    if wide is None or narrow is None or wide.is_complex or narrow.is_complex:
        return wide == narrow
    if narrow == torch.bool:
        return True
    same_kind = wide.is_floating_point == narrow.is_floating_point and wide != torch.bool
    return same_kind and torch.promote_types(wide, narrow) == wide


def is_transparent_cast(node: Node) -> bool:
    """Whether a conversion changes no value over the reals: it does not round to integers."""
    dtypes = dtype_of(node), dtype_of(node.all_input_nodes[0])
    return holds_every_value(*dtypes) or all(d is not None and d.is_floating_point for d in dtypes)


class DropEmptyPieces(Rule):
    """`cat([x, empty])` becomes `cat([x])`."""

    def pattern(self, op: PatternOperators, pieces: Variable) -> Any:
        return op.cat(pieces, ...)

    def condition(self, program: Program, match: Match) -> bool:
        kept = _not_empty(match)
        return 0 < len(kept) < len(match.pieces) and all(
            dtype_of(piece) == dtype_of(match.root) for piece in kept
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.cat.default, _not_empty(match), _cat_axis(match.root))


def _cat_axis(node: Node) -> int:
    return axis_of(node, argument(node, "dim"))


def _not_empty(match: Match) -> list[Node]:
    axis, rank = _cat_axis(match.root), len(shape_of(match.root))

    def length(piece: Node) -> int | None:
        shape = shape_of(piece)
        # Among tensors of any rank, cat skips a vector of nothing.
        return fixed(shape[axis] if len(shape) == rank else shape[0])

    return [piece for piece in match.pieces if length(piece) != 0]


def remove_dead(program: Program) -> int:
    """Erase every call and weight that no output needs; returns how many nodes went."""
    before = len(program.graph.nodes)
    erase_dead(node for node in reversed(program.graph.nodes) if node.op != "placeholder")
    program.remove_unused_weights()
    return before - len(program.graph.nodes)


RULES = (DropNoOperation(), WriteCastAsTo(), MergeCasts(), DropEmptyPieces())
