"""Attention and rotary embedding."""

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.analysis.op_rules.broadcast import FACTORS, moving_axis, tracked
from fxopt.analysis.op_rules.constants import pair, same_along, same_in_pairs
from fxopt.analysis.op_rules.registry import op_rule
from fxopt.analysis.relations import FIXED, Entry, Kind, Labels, Relations, Unit, sizes

fxopt = torch.ops.fxopt

# Why a kv head stays where query heads change places.
WHOLE_GROUP = "a kv head moves only with its whole group"


@op_rule(fxopt.attention.default)
def attention(relations: Relations, node: Node) -> Labels:
    """softmax(q k^T) v: channels of q and k change inversely, those of v pass, heads move together.

    A kv head is read by H / Hkv query heads: what changes in it is tied over them.
    """
    q, k, v, padding, mask, sinks = node.args[:6]
    grids = [_heads(relations, x) for x in (q, k, v)]
    if relations.kind is Kind.CENTRE:
        for grid in grids:
            relations.fix(grid, "attention reads its mean")
        for extra in (padding, mask, sinks):
            if extra is not None:
                relations.fix(relations.labels(extra), "attention reads its mean")
        return relations.fixed(4)
    for word, grid in zip(("query_key", "query_key", "value"), grids, strict=True):
        relations.tag(grid, word)
    if padding is not None:
        relations.fix(relations.labels(padding), "it says which tokens are real")
    if relations.unit is not Unit.CHANNEL and relations.kind not in FACTORS:
        return _move_heads(relations, grids, mask, sinks)
    for extra in (mask, sinks):
        if extra is not None:
            relations.fix(relations.labels(extra), "it belongs to the heads as they stand")
    return _move_channels(relations, grids)


def _heads(relations: Relations, x: Any) -> Labels:
    """The labels [heads, channels] of q, k or v; they may not depend on the token."""
    labels = relations.labels(x)
    for axis in (0, 2):
        labels = relations.collapse(labels, axis)
    heads, channels = sizes(x)[1], sizes(x)[3]
    if heads is None or channels is None:
        relations.fix(labels, "the number of its heads varies")
        return np.full((labels.shape[1], labels.shape[3]), FIXED, dtype=np.int64)
    return np.broadcast_to(labels[0, :, 0, :], (heads, channels))


def _move_channels(relations: Relations, grids: list[Labels]) -> Labels:
    q, k, v = grids
    group = q.shape[0] // k.shape[0]
    relations.couple(q, np.repeat(k, group, 0), inverse=relations.kind is Kind.SCALE)
    out = np.repeat(v, group, 0)
    for grid in (q, k, v, out):
        relations.row(grid)
    return out[None, :, None, :]


def _move_heads(relations: Relations, grids: list[Labels], mask: Any, sinks: Any) -> Labels:
    """Labels per head: query heads of one kv head change places, or whole groups do."""
    q, k, v = (relations.collapse(grid, 1)[:, 0] for grid in grids)
    group = q.size // k.size
    relations.couple(k, v)
    whole = relations.unit is Unit.GROUP or group == 1
    if whole:
        relations.couple(q, np.repeat(k, group))
        relations.row(k[None])
    else:
        relations.fix(k, WHOLE_GROUP)
        relations.row(q.reshape(-1, group))
    for extra, axis in ((mask, 1), (sinks, 0)):
        if extra is not None:
            _per_head(relations, extra, axis, q)
    relations.tag(q, "heads")
    return q[None, :, None, None]


def _per_head(relations: Relations, extra: Node, axis: int, q: Labels) -> None:
    """What is added to the scores moves with the heads, unless it is the same for all."""
    labels = relations.labels(extra)
    # Heads that are removed would have to be removed from it too, whatever its values.
    moves = relations.kind is not Kind.SLICE
    if sizes(extra)[axis] == 1 or (moves and same_along(relations.program, extra, axis)):
        return
    for other in range(labels.ndim):
        if other != axis:
            labels = relations.collapse(labels, other)
    relations.couple(labels.reshape(-1), q, why="a mask or bias belongs to the head")


@op_rule(fxopt.rope.default)
def rope(relations: Relations, node: Node) -> Labels:
    """Turn pairs of channels: one factor, and one rotation of the plane, per pair.

    Pairs change places with their cos and sin.
    """
    x, cos, sin, interleaved = node.args
    labels = relations.labels(x)
    for table in (cos, sin):
        relations.fix(relations.labels(table), "angles belong to positions")
    rotary = int(cos.meta["val"].shape[-1])  # type: ignore[union-attr]
    if labels.shape[-1] == 1 and relations.unit is not Unit.CHANNEL:
        return _turn_heads(relations, node, labels)
    wide = np.broadcast_to(labels, [*labels.shape[:-1], sizes(x)[-1]])  # type: ignore[list-item]
    turned = wide[..., :rotary]
    if relations.kind is Kind.CENTRE:
        relations.fix(turned, "rotary embedding turns pairs of channels by their own angles")
        return wide
    first, second = pair(turned, bool(interleaved))
    if relations.kind is Kind.ROTATE:
        _turn_pairs(relations, node, np.stack((first, second), -1).reshape(-1, 2))
        return wide
    relations.couple(first, second)
    if relations.kind in FACTORS:
        return wide
    relations.row(turned.reshape(-1, rotary))
    if relations.unit is Unit.CHANNEL:
        _move_angles(relations, node, turned)
    return wide


def _turn_pairs(relations: Relations, node: Node, pairs: Labels) -> None:
    """Turns of one plane commute; a reflection, or two angles in a pair, do not."""
    interleaved: Any = node.args[3]
    tables: Any = node.args[1:3]
    if not all(same_in_pairs(relations.program, table, interleaved) for table in tables):
        relations.fix(
            pairs, "rotary embedding turns the two channels of a pair by angles that may differ"
        )
    relations.row(pairs)
    relations.tag(pairs, "rotary_pair")


def _turn_heads(relations: Relations, node: Node, labels: Labels) -> Labels:
    """Whole heads pass; tables whose angles differ by head follow, by an index in front."""
    moving = moving_axis(relations, labels)
    if moving is None:
        return labels
    for axis in tracked(labels):
        labels = labels if axis == moving else relations.collapse(labels, axis)
    tables: Any = node.args[1:3]
    for operand, table in enumerate(tables, 1):
        length = _length(table, moving - labels.ndim)
        if length == 1:
            continue
        if relations.kind is not Kind.PERMUTE or labels.ndim != 4 or length != labels.size:
            relations.fix(labels, "its heads turn by angles of their own")
        else:
            held = labels.reshape(-1)
            relations.entries.append(Entry("operand", node.name, (moving,), held, operand=operand))
    return labels


def _length(table: Any, from_end: int) -> int | None:
    """The length of a table's axis, counted from its last; leading axes may be missing."""
    shape = sizes(table)
    return shape[from_end] if len(shape) >= -from_end else 1


def _move_angles(relations: Relations, node: Node, turned: Labels) -> None:
    """Cos and sin follow the pairs, in each head, by an index in front of this operator."""
    heads = tracked(turned)[:-1]
    tables: Any = node.args[1:3]
    for operand, table in enumerate(tables, 1):
        lengths = [_length(table, axis - turned.ndim) in (1, turned.shape[axis]) for axis in heads]
        if turned.ndim != 4 or heads not in ([], [1], [2]) or not all(lengths):
            relations.fix(turned, "its angles cannot be put in another order")
            return
        axes, held = (*heads, 3), turned.reshape(-1)
        relations.entries.append(Entry("operand", node.name, axes, held, operand=operand))
