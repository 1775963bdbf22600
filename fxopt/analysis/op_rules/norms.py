"""Norms and softmax: operators that look at a whole axis at once."""

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.analysis.op_rules.broadcast import (
    FACTORS,
    dropped,
    moving_axis,
    rows_along,
    shared,
    tracked,
)
from fxopt.analysis.op_rules.elementwise import block
from fxopt.analysis.op_rules.registry import op_rule
from fxopt.analysis.relations import Entry, Kind, Labels, Relations, sizes
from fxopt.ir.program import Program

aten = torch.ops.aten


@op_rule(aten.rms_norm.default)
def rms_norm(relations: Relations, node: Node) -> Labels:
    """X / rms(x) g: places pass, factors start at the gain, rotations need it folded."""
    x, shape, gain = [*node.args, None][:3]
    return _norm(relations, node, x, shape, gain, None, centred=False)


@op_rule(aten.layer_norm.default)
def layer_norm(relations: Relations, node: Node) -> Labels:
    """(x - mean) / std g + b: as rms_norm, but a rotation would move the mean."""
    x, shape, gain, bias = [*node.args, None, None][:4]
    return _norm(relations, node, x, shape, gain, bias, centred=True)


def _norm(
    relations: Relations, node: Node, x: Any, shape: Any, gain: Any, bias: Any, centred: bool
) -> Labels:
    if len(shape) != 1:
        return block(relations, node, "a norm over several axes has no rule")
    kind, labels = relations.kind, relations.labels(x)
    if kind is Kind.CENTRE:
        return _centre(relations, node, labels, gain, bias, centred)
    if kind is Kind.SCALE or (kind is Kind.SIGN and centred):
        relations.fix(labels, "a norm measures all of it together")
        return _after(relations, node, relations.fixed(labels.ndim), gain, bias)
    if kind is Kind.ROTATE:
        _refuse_rotation(relations, labels, gain, centred)
    relations.tag(labels, "normalized")
    given = shared(relations, labels, labels.ndim - 1)
    vectors = [vector for vector in (gain, bias) if vector is not None]
    if given is None:
        for vector in vectors:
            relations.fix(relations.labels(vector), "every head reads the same gain")
        return relations.collapse(labels, labels.ndim - 1)
    if kind is Kind.SIGN:
        return _after(relations, node, given, gain, bias)
    for vector in vectors:
        if not (kind is Kind.ROTATE and vector is gain):
            relations.couple(given, relations.labels(vector))
    return labels


def _refuse_rotation(relations: Relations, labels: Labels, gain: Any, centred: bool) -> None:
    if centred:
        relations.fix(labels, "layer_norm subtracts a mean, which a rotation would move")
    if gain is not None and not is_one(relations.program, gain):
        relations.fix(labels, "the gain of a norm stands in the way; run fold-norm first")


def _after(relations: Relations, node: Node, core: Labels, gain: Any, bias: Any) -> Labels:
    """The labels behind a norm whose core has labels `core`: those of the gain."""
    rank = len(sizes(node))
    if gain is None:
        return core.reshape((1,) * (rank - 1) + (-1,))
    labels = relations.labels(gain)
    relations.tag(labels, "gain")
    if relations.kind is Kind.SIGN and (core != 0).any():
        out = relations.fresh(labels.shape)
        relations.product(out, labels, core.reshape(labels.shape))
        labels = out
    if bias is not None:
        relations.couple(labels, relations.labels(bias))
    return labels.reshape((1,) * (rank - 1) + (-1,))


def _centre(
    relations: Relations, node: Node, labels: Labels, gain: Any, bias: Any, centred: bool
) -> Labels:
    if centred:
        last = labels.ndim - 1
        for axis in tracked(labels):
            labels = labels if axis == last else relations.collapse(labels, axis)
        relations.row(labels.reshape(1, -1))
        flat = np.broadcast_to(labels.reshape(-1), (sizes(node)[-1] or 1,))
        relations.entries.append(Entry("operand", node.name, (last,), flat, operand=0))
    else:
        relations.fix(labels, "rms_norm reads the mean")
    for vector in (gain, bias):
        if vector is not None:
            relations.fix(relations.labels(vector), "it follows the norm")
    return relations.fixed(len(sizes(node)))


def is_one(program: Program, gain: Any) -> bool:
    """Whether a gain, plain or as `weight + number`, is one everywhere."""
    value = gain_value(program, gain)
    return value is not None and bool((value == 1).all())


def gain_value(program: Program, gain: Any) -> torch.Tensor | None:
    """The value of a gain that is a weight, or a weight plus a number, perhaps converted."""
    if not isinstance(gain, Node):
        return None
    if gain.op == "get_attr":
        return program.weight(str(gain.target)).double()
    if gain.target is aten.to.dtype:
        return gain_value(program, gain.args[0])
    if gain.target is aten.add.Tensor and not gain.kwargs:
        weight, number = gain.args
        held = gain_value(program, weight)
        if held is not None and isinstance(number, int | float):
            return held + number
    return None


@op_rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(relations: Relations, node: Node) -> Labels:
    """Softmax along an axis: places pass within the axis, nothing else does."""
    labels, axis = relations.labels(node.args[0]), node.args[1]
    if relations.kind in (*FACTORS, Kind.ROTATE, Kind.CENTRE):
        relations.fix(labels, "softmax reads it")
        return relations.fixed(labels.ndim)
    if labels.shape[axis] > 1:  # type: ignore[index]
        relations.row(rows_along(labels, axis))  # type: ignore[arg-type]
    return labels


@op_rule(aten.amax.default, aten.amin.default)
def extreme(relations: Relations, node: Node) -> Labels:
    """Max over axes: a positive factor passes where the axis has one; places as in a sum."""
    axes: Any = node.args[1]
    labels = relations.labels(node.args[0])
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    axes = [axis % labels.ndim for axis in axes]
    moving = moving_axis(relations, labels)
    if relations.kind in (Kind.SIGN, Kind.ROTATE, Kind.CENTRE):
        return block(relations, node, "the largest element is taken")
    if moving is not None and moving in axes and relations.kind is not Kind.SCALE:
        relations.row(rows_along(labels, moving))
        return relations.fixed(len(sizes(node)))
    for axis in axes:
        labels = relations.collapse(labels, axis)
    if keep:
        return labels
    return dropped(labels, axes)
