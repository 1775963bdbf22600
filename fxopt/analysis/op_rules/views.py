"""Views: labels move along with what they stand for."""

import operator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.analysis.op_rules.broadcast import FACTORS, tracked
from fxopt.analysis.op_rules.elementwise import block, is_tensor
from fxopt.analysis.op_rules.registry import op_rule
from fxopt.analysis.relations import FIXED, Labels, Relations, Unit, hints, sizes

aten = torch.ops.aten
_END = 2**62


@op_rule(aten.transpose.int)
def transpose(relations: Relations, node: Node) -> Labels:
    """Two axes exchanged."""
    return np.swapaxes(relations.labels(node.args[0]), *_ints(node.args[1:3]))


@op_rule(aten.t.default)
def matrix_transpose(relations: Relations, node: Node) -> Labels:
    """A matrix turned over."""
    return relations.labels(node.args[0]).T


@op_rule(aten.permute.default)
def permute(relations: Relations, node: Node) -> Labels:
    """Axes in another order."""
    order: Any = node.args[1]
    return relations.labels(node.args[0]).transpose(order)


@op_rule(aten.unsqueeze.default)
def unsqueeze(relations: Relations, node: Node) -> Labels:
    """One more axis of length one."""
    axis: Any = node.args[1]
    labels = relations.labels(node.args[0])
    return np.expand_dims(labels, axis % (labels.ndim + 1))


@op_rule(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.squeeze.dim)
def reshape(relations: Relations, node: Node) -> Labels:
    """Axes merged and split; a label that depends on an axis merged with a varying one is lost."""
    source: Any = node.args[0]
    labels, old, new = relations.labels(source), hints(source), hints(node)
    if old is None or new is None or 0 in old:
        return block(relations, node, "its shape cannot be told")
    shape: list[int] = []
    for (a, c), (b, d) in pairwise(_boundaries(old, new)):
        if all(labels.shape[axis] == 1 for axis in range(a, b)):
            shape += [1] * (d - c)
            continue
        if b - a == d - c == 1 or None not in sizes(source)[a:b]:
            wide = list(labels.shape)
            wide[a:b] = old[a:b]
            copied = labels.shape != tuple(wide)
            labels = np.broadcast_to(labels, wide)
            if copied and relations.kind not in FACTORS:
                labels = relations.behind(labels)
            shape += new[c:d]
            continue
        for axis in range(a, b):
            labels = relations.collapse(labels, axis)
        shape += [1] * (d - c)
    return _heads_first(relations, labels.reshape(shape))


def _boundaries(old: list[int], new: list[int]) -> list[tuple[int, int]]:
    """Positions (in old, in new) between which both shapes hold the same number of elements."""
    ends = [(0, 0)]
    a = b = 0
    left = right = 1
    while a < len(old) or b < len(new):
        if left <= right and a < len(old):
            left, a = left * old[a], a + 1
        else:
            right, b = right * new[b], b + 1
        if left == right:
            while a < len(old) and old[a] == 1:
                a += 1
            while b < len(new) and new[b] == 1:
                b += 1
            ends.append((a, b))
            left = right = 1
    return ends


def _heads_first(relations: Relations, labels: Labels) -> Labels:
    """Where heads move as a whole, the channels of one do not move in it."""
    if relations.unit is Unit.CHANNEL or relations.kind in FACTORS:
        return labels
    for axis in tracked(labels)[1:]:
        labels = relations.collapse(labels, axis)
    return labels


@op_rule(aten.expand.default, by_element=True)
def expand(relations: Relations, node: Node) -> Labels:
    """A value repeated: its labels do not depend on where."""
    labels = relations.labels(node.args[0])
    return labels.reshape((1,) * (len(sizes(node)) - labels.ndim) + labels.shape)


@op_rule(aten.repeat.default, aten.repeat_interleave.self_int)
def repeat(relations: Relations, node: Node) -> Labels:
    """Copies side by side; along an axis that the labels depend on, the copies are tied."""
    labels = relations.labels(node.args[0])
    if node.target is aten.repeat.default:
        counts: Any = node.args[1]
        labels = labels.reshape((1,) * (len(counts) - labels.ndim) + labels.shape)
        if all(labels.shape[i] == 1 or isinstance(c, int) for i, c in enumerate(counts)):
            return np.tile(labels, [c if labels.shape[i] > 1 else 1 for i, c in enumerate(counts)])
        return block(relations, node, "it is repeated a varying number of times")
    count: Any = node.args[1]
    axis: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if axis is None or not isinstance(count, int):
        return block(relations, node, "it is repeated in a way that has no rule")
    return labels if labels.shape[axis] == 1 else np.repeat(labels, count, axis)


@op_rule(aten.select.int)
def select(relations: Relations, node: Node) -> Labels:
    """One position of an axis."""
    labels: Labels = relations.labels(node.args[0])
    arguments: Any = node.args
    axis, position = int(arguments[1]), arguments[2]
    if labels.shape[axis] > 1 and not isinstance(position, int):
        labels = relations.collapse(labels, axis)
    return np.take(labels, position if labels.shape[axis] > 1 else 0, axis)


@op_rule(aten.slice.Tensor)
def cut(relations: Relations, node: Node) -> Labels:
    """A range of an axis."""
    labels = relations.labels(node.args[0])
    arguments: list[Any] = [*node.args[1:], *[0, None, None, 1][len(node.args) - 1 :]]
    axis, start, end, step = arguments
    if labels.shape[axis] == 1:
        return labels
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        return relations.collapse(labels, axis)
    ends = None if end is None or end > _END else end
    return labels[(slice(None),) * (axis % labels.ndim) + (slice(start, ends, step),)]


@op_rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(relations: Relations, node: Node) -> list[Labels]:
    """Consecutive ranges of an axis."""
    labels, parts = relations.labels(node.args[0]), node.meta["val"]
    axis: Any = node.args[2] if len(node.args) > 2 else 0
    if labels.shape[axis] == 1:
        return [labels for _ in parts]
    lengths = [int(part.shape[axis]) for part in parts]
    return np.split(labels, np.cumsum(lengths)[:-1], axis)


@op_rule(operator.getitem)
def item(relations: Relations, node: Node) -> Labels:
    """One of several results."""
    arguments: Any = node.args
    source, position = arguments
    if is_tensor(source):
        return block(relations, node, "it is indexed in a way that has no rule")
    held: Any = relations.values.get(source)
    return held[position] if isinstance(held, list) else relations.fixed(len(sizes(node)))


@op_rule(aten.sym_size.int)
def size(relations: Relations, node: Node) -> Labels:
    """Only the shape is read."""
    del node
    return relations.fixed(0)


@op_rule(aten.cat.default)
def cat(relations: Relations, node: Node) -> Labels:
    """Values side by side: their labels too, where all of them depend on the axis."""
    operands: Any = node.args[0]
    axis: int = node.args[1] if len(node.args) > 1 else 0  # type: ignore[assignment]
    rank = len(sizes(node))
    axis %= rank
    labels = [relations.labels(operand) for operand in operands]
    lengths = [sizes(operand)[axis] for operand in operands]
    single = all(length == 1 for length in lengths)
    along = (single or any(own.shape[axis] > 1 for own in labels)) and None not in lengths
    if not along:
        labels = [relations.collapse(own, axis) for own in labels]
        return _alike(relations, labels)
    wide: list[Labels] = []
    shape = np.broadcast_shapes(*[_without(own, axis) for own in labels])
    for own, length in zip(labels, lengths, strict=True):
        wide.append(np.broadcast_to(own, [*shape[:axis], length, *shape[axis + 1 :]]))  # type: ignore[list-item]
    return np.concatenate(wide, axis)


def _without(labels: Labels, axis: int) -> tuple[int, ...]:
    return (*labels.shape[:axis], 1, *labels.shape[axis + 1 :])


def _alike(relations: Relations, labels: list[Labels]) -> Labels:
    """Operands that lie one after the other along tokens change alike."""
    first = max(labels, key=lambda own: (own.size, bool((own != FIXED).any())))
    for own in labels:
        if own is not first:
            relations.couple(first, own)
    return first


@op_rule(aten.stack.default)
def stack(relations: Relations, node: Node) -> Labels:
    """Values side by side along a new axis."""
    operands: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return np.stack(np.broadcast_arrays(*[relations.labels(o) for o in operands]), axis)


@op_rule(aten.flip.default)
def flip(relations: Relations, node: Node) -> Labels:
    """Axes backwards."""
    axes: Any = node.args[1]
    return np.flip(relations.labels(node.args[0]), axes)


@op_rule(aten.index.Tensor)
def index(relations: Relations, node: Node) -> Labels:
    """Positions picked along leading axes that the labels do not depend on, or along one axis."""
    indices: Any = node.args[1]
    labels = relations.labels(node.args[0])
    picked = len(indices)
    given = [axis for axis, entry in enumerate(indices) if entry is not None]
    if len(given) == 1 and _is_list_of_places(indices[given[0]]):
        return _pick(relations, node, given[0], indices[given[0]])
    for given in indices:
        if given is not None:
            relations.fix(relations.labels(given), "elements are found by it")
    if any(entry is None for entry in indices) or any(n > 1 for n in labels.shape[:picked]):
        return block(relations, node, "its elements are picked by an index")
    rest = labels.shape[picked:]
    return labels.reshape((1,) * (len(sizes(node)) - len(rest)) + rest)


@op_rule(aten.index_select.default)
def index_select(relations: Relations, node: Node) -> Labels:
    """Positions picked along one axis by a stored index: their labels."""
    arguments: Any = node.args
    return _pick(relations, node, arguments[1], arguments[2])


def _is_list_of_places(value: Node) -> bool:
    """Whether an index is a row of integers; bits choose in another way."""
    return len(sizes(value)) == 1 and value.meta["val"].dtype in (torch.int64, torch.int32)


def _pick(relations: Relations, node: Node, axis: int, chosen: Node) -> Labels:
    labels = relations.labels(node.args[0])
    index = relations.program.constant(chosen)
    if labels.shape[axis] == 1:
        relations.fix(relations.labels(chosen), "elements are found by it")
        return labels
    if index is None:
        return block(relations, node, "its elements are picked by an index")
    return np.take(labels, index.numpy(), axis)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
