"""How operands of different shapes meet, coordinate by coordinate."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxopt.analysis.relations import FIXED, Kind, Labels, Relations, Unit, sizes

FACTORS = (Kind.SCALE, Kind.SIGN)


def aligned(labels: Labels, rank: int) -> Labels:
    """The same labels with leading axes of length one."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def tracked(labels: Labels) -> list[int]:
    """The axes that the labels depend on."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def moving_axis(relations: Relations, labels: Labels) -> int | None:
    """The axis whose coordinates change: channels lie inside, heads outside."""
    axes = tracked(labels)
    if not axes:
        return None
    return axes[-1] if relations.unit is Unit.CHANNEL else axes[0]


def dropped(labels: Labels, axes: Sequence[int]) -> Labels:
    """Labels without some axes, which they do not depend on."""
    shape: list[int] = [n for axis, n in enumerate(labels.shape) if axis not in axes]
    return labels.reshape(shape)


def rows_along(labels: Labels, axis: int) -> Labels:
    """Labels as rows [others, length of the axis]."""
    return np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis])


def join(relations: Relations, operands: Sequence[Any], rank: int, multiply: bool) -> Labels:
    """The labels of a sum or product of tensors.

    Factors meet element by element. Otherwise the operand that has every axis the labels depend
    on sets the labels, and each other operand meets it along the axis that moves: the same
    coordinates change alike, and an operand that is repeated along that axis only asks that
    nothing leaves its row.
    """
    labels = [aligned(relations.labels(operand), rank) for operand in operands]
    if relations.kind in FACTORS:
        return _factors(relations, labels, multiply)
    shapes = [[1] * (rank - len(sizes(operand))) + sizes(operand) for operand in operands]
    labels = _within_reach(relations, operands, labels, shapes)
    needed = {axis for own in labels for axis in tracked(own)}
    full = [i for i, shape in enumerate(shapes) if all(shape[axis] != 1 for axis in needed)]
    if not full:
        for own in labels:
            relations.fix(own, "it is combined with a value that lies along another axis")
        return relations.fixed(rank)
    # Of several full operands, the first whose labels depend on something says what moves.
    base = max(full, key=lambda i: (len(tracked(labels[i])), (labels[i] != FIXED).any(), -i))
    result = relations.behind(labels[base])
    for index, other in enumerate(labels):
        if index != base:
            _meet(relations, result, other, shapes[index], multiply)
    return result


def _within_reach(
    relations: Relations,
    operands: Sequence[Any],
    labels: Sequence[Labels],
    shapes: Sequence[Sequence[int | None]],
) -> list[Labels]:
    """Labels of weights, alike along axes whose places no computed operand tells apart.

    A table of positions [tokens, channels] is added to channels: its tokens are no hidden axis.
    """
    reach = list(labels)
    computed = [i for i, operand in enumerate(operands) if operand not in relations.from_weights]
    for index, operand in enumerate(operands if computed else ()):
        if operand not in relations.from_weights:
            continue
        for axis in tracked(reach[index]):
            if all(labels[i].shape[axis] == 1 and shapes[i][axis] != 1 for i in computed):
                reach[index] = relations.collapse(reach[index], axis)
    return reach


def _factors(relations: Relations, labels: Sequence[Labels], multiply: bool) -> Labels:
    result = labels[0]
    for other in labels[1:]:
        if not multiply:
            relations.couple(result, other)
            result = np.broadcast_arrays(result, other)[0]
        elif (other == FIXED).all():
            result = np.broadcast_arrays(result, other)[0]
        elif (result == FIXED).all():
            result = np.broadcast_arrays(result, other)[1]
        else:
            shape = np.broadcast_shapes(result.shape, other.shape)
            out = relations.fresh(shape)
            relations.product(out, result, other)
            result = out
    return result


def _meet(
    relations: Relations, base: Labels, other: Labels, shape: Sequence[int | None], multiply: bool
) -> None:
    axis = moving_axis(relations, base)
    linear = relations.kind in (Kind.ROTATE, Kind.CENTRE)
    if axis is not None and shape[axis] == 1:  # repeated along the axis that moves
        relations.row(rows_along(base, axis))
        relations.fix(other, "it is the same for everything that would change places")
        if linear and not multiply:
            relations.fix(base, "the same number is added to every channel")
    elif linear and multiply:
        for labels in (base, other):
            relations.fix(labels, "it is multiplied channel by channel")
    else:
        relations.couple(base, other)


def shared(relations: Relations, labels: Labels, axis: int) -> Labels | None:
    """The labels [n] of a vector that is applied along `axis`, alike at all other positions.

    None where the vector must stay as it is, because whole heads move over it.
    """
    others = [a for a in tracked(labels) if a != axis]
    if not others:
        relations.row(labels.reshape(1, -1))
        return labels.reshape(-1)
    if relations.kind not in FACTORS and relations.unit is not Unit.CHANNEL:
        relations.collapse(labels, axis)
        relations.row(rows_along(labels, others[0]))
        return None
    held = labels
    for other in others:
        held = relations.collapse(held, other)
    relations.row(held.reshape(1, -1))
    return held.reshape(-1)
