"""Write every change of shape in one way: reshape, transpose or t or permute, slice, select.

    reshape(reshape(x, s), t) = reshape(x, t)
    permute(permute(x, p), q) = permute(x, p[q])
    split(x, n, axis)[i] = x[n i : n (i + 1)]  along axis

Shapes: any; a result keeps its shape, its strides may differ from the model's.
Exactness: bit-equal, no value is computed.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import operator
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.canonicalize.cleanup import holds_every_value
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments, packet_of
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed

aten = torch.ops.aten
TO_THE_END = 2**63 - 1  # how ATen writes an open end of a slice


class WriteViewAsReshape(Rule):
    """`view`, `flatten` and `unflatten` become `reshape`, which copies only where it must."""

    def pattern(self, op: PatternOperators, x: Variable) -> list[Any]:
        names = (op.view, op._unsafe_view, op.flatten, op.unflatten, op.view_as, op.reshape_as)
        return [name(x, ...) for name in names]

    def condition(self, program: Program, match: Match) -> bool:
        symbolic = [size for size in shape_of(match.root) if fixed(size) is None]
        known = match.root.target in (aten.view.default, aten._unsafe_view.default)
        is_view = match.root.target is not aten.view.dtype
        return is_view and (known or len(symbolic) <= 1 or _untouched(match) is not None)

    def rewrite(self, build: Builder, match: Match) -> Node:
        root = match.root
        if root.target in (aten.view.default, aten._unsafe_view.default):
            return build.call(aten.reshape.default, match.x, root.args[1])
        before = _untouched(match) or 0
        sizes: list[Any] = [build.size(match.x, axis) for axis in range(before)]
        rest = [fixed(size) for size in shape_of(root)[before:]]
        sizes += [-1 if size is None else size for size in rest]
        return build.call(aten.reshape.default, match.x, sizes)


def _untouched(match: Match) -> int | None:
    """How many leading axes stay, if at most one axis after them has no fixed size."""
    if packet_of(match.root) not in (aten.flatten, aten.unflatten):
        return None
    before = axis_of(match.x, all_arguments(match.root)[1])
    rest = shape_of(match.root)[before:]
    return before if sum(fixed(size) is None for size in rest) <= 1 else None


class MergeReshapes(Rule):
    """`reshape(reshape(x, s), t)` becomes `reshape(x, t)`."""

    def pattern(self, op: PatternOperators, x: Variable, sizes: Variable) -> Any:
        return op.reshape(op.reshape(x, ...), sizes)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.reshape.default, match.x, match.sizes)


class MergePermutations(Rule):
    """Permutations of axes in a row become one, in its shortest form."""

    def pattern(self, op: PatternOperators, x: Variable) -> list[Any]:
        return [getattr(op, name)(x, ...) for name in _PERMUTATIONS]

    def condition(self, program: Program, match: Match) -> bool:
        source, order = permutation(match.root)
        inner = permutation(source)[0] is not source
        return len(order) > 0 and (inner or not _is_shortest(match.root, order))

    def rewrite(self, build: Builder, match: Match) -> Node:
        source, order = permutation(match.root)
        origin, inner = permutation(source)
        if origin is not source:
            order = [inner[axis] for axis in order]
        return permute(build, origin, order)


class PermuteBeforeWidening(Rule):
    """`permute(to(x, wider))` becomes `to(permute(x), wider)`: casts meet what computes in them."""

    def pattern(self, op: PatternOperators, x: Variable) -> list[Any]:
        cast = op.named("cast", op.to(x, ...))
        return [getattr(op, name)(cast, ...) for name in _PERMUTATIONS]

    def condition(self, program: Program, match: Match) -> bool:
        return match.cast.target is aten.to.dtype and holds_every_value(
            dtype_of(match.cast), dtype_of(match.x)
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        moved = permute(build, match.x, permutation(match.root)[1])
        return build.call(aten.to.dtype, moved, dtype_of(match.root))


_PERMUTATIONS = ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim")


def permutation(node: Node) -> tuple[Node, list[int]]:
    """What a node permutes and in which order: axis i of the result is axis order[i] before.

    A node that permutes nothing stands for itself.
    """
    rank = len(shape_of(node))
    order = list(range(rank))
    packet = packet_of(node) if node.op == "call_function" else None
    if packet is aten.permute:
        order = [axis % rank for axis in all_arguments(node)[1]]
    elif packet in (aten.transpose, aten.swapaxes, aten.swapdims):
        a, b = (axis % rank for axis in all_arguments(node)[1:3])
        order[a], order[b] = b, a
    elif node.target is aten.movedim.int:
        source, target = (axis % rank for axis in all_arguments(node)[1:3])
        order.insert(target, order.pop(source))
    elif packet in (aten.t, aten.numpy_T):
        order.reverse()
    elif packet is aten.mT:
        order[-2:] = [rank - 1, rank - 2]
    else:
        return node, order
    return node.all_input_nodes[0], order


def permute(build: Builder, x: Node, order: list[int]) -> Node:
    """Permute axes with the operator that says it shortest."""
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return x
    if len(moved) > 2:
        return build.call(aten.permute.default, x, order)
    if len(order) == 2:
        return build.call(aten.t.default, x)
    return build.call(aten.transpose.int, x, *moved)


def _is_shortest(node: Node, order: list[int]) -> bool:
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if len(moved) > 2:
        return node.target is aten.permute.default and list(node.args[1]) == order  # type: ignore[arg-type]
    if len(order) == 2:
        return node.target is aten.t.default and bool(moved)
    return node.target is aten.transpose.int and list(node.args[1:]) == moved


class WriteSplitAsSlices(Rule):
    """A part of `chunk`, `split` or `unbind` becomes a `slice` or `select` of the whole."""

    def pattern(self, op: PatternOperators, x: Variable, index: Variable) -> list[Any]:
        names = (op.chunk, op.split, op.split_with_sizes, op.tensor_split, op.unbind)
        return [op.call(operator.getitem, op.named("whole", name(x, ...)), index) for name in names]

    def condition(self, program: Program, match: Match) -> bool:
        axis = _split_axis(match.whole)
        parts = match.whole.meta["val"]
        return packet_of(match.whole) is aten.unbind or all(
            fixed(part.shape[axis]) is not None for part in parts
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        axis = axis_of(match.x, _split_axis(match.whole))
        parts = match.whole.meta["val"]
        index = match.index % len(parts)
        if packet_of(match.whole) is aten.unbind:
            return build.call(aten.select.int, match.x, axis, index)
        start = sum(int(part.shape[axis]) for part in parts[:index])
        stop = start + int(parts[index].shape[axis])
        return build.call(aten.slice.Tensor, match.x, axis, start, stop)


def _split_axis(node: Node) -> int:
    return all_arguments(node)[1 if packet_of(node) is aten.unbind else 2]


class WriteSliceBounds(Rule):
    """Axis and bounds of a slice are counted from the front; an open end is `TO_THE_END`."""

    def pattern(self, op: PatternOperators, x: Variable) -> Any:
        return op.slice(x, ...)

    def condition(self, program: Program, match: Match) -> bool:
        return list(match.root.args[1:]) != _bounds(match.root) and not match.root.kwargs

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.slice.Tensor, match.x, *_bounds(match.root))


def _bounds(node: Node) -> list[Any]:
    x, axis, start, stop, step = all_arguments(node)
    axis = axis_of(x, axis)
    size = fixed(shape_of(x)[axis])
    start = 0 if start is None else start
    stop = TO_THE_END if stop is None else stop
    if size is not None:
        start, stop = (_from_the_front(bound, size) for bound in (start, stop))
        stop = TO_THE_END if isinstance(stop, int) and stop >= size else stop
    return [axis, start, stop] if step == 1 else [axis, start, stop, step]


def _from_the_front(bound: Any, size: int) -> Any:
    # One that reaches past the front stands at the front: left negative, it would count again.
    return max(bound + size, 0) if isinstance(bound, int) and bound < 0 else bound


RULES = (
    WriteViewAsReshape(),
    MergeReshapes(),
    MergePermutations(),
    PermuteBeforeWidening(),
    WriteSplitAsSlices(),
    WriteSliceBounds(),
)
