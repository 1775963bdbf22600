"""Operators that sum over an axis: linear, embedding, convolution, matmul, experts, reductions."""

import operator
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.analysis.op_rules.broadcast import FACTORS, dropped, moving_axis, rows_along, shared
from fxopt.analysis.op_rules.elementwise import block, is_tensor
from fxopt.analysis.op_rules.registry import op_rule
from fxopt.analysis.relations import FIXED, Kind, Labels, Relations, Unit, sizes

aten = torch.ops.aten
fxopt = torch.ops.fxopt


def _stored(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _along(labels: Labels, rank: int, axis: int) -> Labels:
    """A vector of labels as those of a value that depends on one axis."""
    shape = [1] * rank
    shape[axis] = labels.size
    return labels.reshape(shape)


def _source_that_stays(relations: Relations, node: Node) -> str:
    """Where what cannot change comes from: the operator that passes nothing on, or an input."""
    while node.op != "placeholder":
        if node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        sources = [n for n in node.all_input_nodes if is_tensor(n) and not _stored(n)]
        fixed = (n for n in sources if bool((relations.labels(n) == FIXED).all()))
        following = next(fixed, None)
        if following is None:
            return f"comes out of {node.target}"
        node = following
    return f"comes from the input {node.name!r}"


def _read(
    relations: Relations, source: Any, x: Labels, weight: Any, axis: int, column: int
) -> bool:
    """`weight` takes up along its axis `column` what changes along `axis` of x, inversely.

    `x` are the labels of `source`.
    """
    if relations.kind is Kind.CENTRE:
        relations.fix(x, "its mean is read")
        read = relations.weight_axes(weight, (column,))
        relations.fix(read, f"a linear reads {weight.target} by its columns; run untie first")
        return True
    given = shared(relations, x, axis)
    if given is None:
        return False
    taken = relations.weight_axes(weight, (column,))
    why = ""
    if bool((given == FIXED).any()):
        why = f"what it reads {_source_that_stays(relations, source)} and cannot change"
    relations.couple(given, taken, inverse=relations.kind is Kind.SCALE, why=why)
    return True


@op_rule(aten.linear.default)
def linear(relations: Relations, node: Node) -> Labels:
    """X W^T + b: columns of W take up what changes in x, rows of W and b what changes in y."""
    x, weight, bias = [*node.args, None][:3]
    rank = len(sizes(node))
    if not _stored(weight) or (bias is not None and not _stored(bias)):
        return block(relations, node, "its weight is computed in the graph")
    labels = relations.labels(x)
    if not _read(relations, x, labels, weight, labels.ndim - 1, 1):
        # Whole heads pass through a linear that is the same for each of them.
        for held in (0, 1):
            relations.fix(
                relations.weight_axes(weight, (held,)), "every head reads the same weight"
            )
        return np.take(labels, [0], -1)
    out = relations.weight_axes(weight, (0,))
    if bias is not None:
        relations.couple(out, relations.weight_axes(bias, (0,)))
    return _along(out, rank, rank - 1)


@op_rule(aten.embedding.default)
def embedding(relations: Relations, node: Node) -> Labels:
    """W[i]: columns of the table take up what changes in the result; rows are found by number."""
    weight, rank = node.args[0], len(sizes(node))
    if not _stored(weight):
        return block(relations, node, "its table is computed in the graph")
    relations.fix(relations.labels(node.args[1]), "rows are found by it")
    relations.fix(relations.weight_axes(weight, (0,)), "its rows are found by number")
    return _along(relations.weight_axes(weight, (1,)), rank, rank - 1)


@op_rule(aten.conv1d.default, aten.conv2d.default)
def convolution(relations: Relations, node: Node) -> Labels:
    """Channels as in a linear; positions are not changed."""
    x, weight, bias = [*node.args, None][:3]
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    if not _stored(weight) or groups != 1 or (bias is not None and not _stored(bias)):
        return block(relations, node, "a convolution in groups, or with a computed weight")
    labels = relations.labels(x)
    for axis in range(2, labels.ndim):
        labels = relations.collapse(labels, axis)
    if not _read(relations, x, labels, weight, 1, 1):
        return block(relations, node, "a convolution mixes all of it")
    out = relations.weight_axes(weight, (0,))
    if bias is not None:
        relations.couple(out, relations.weight_axes(bias, (0,)))
    return _along(out, len(sizes(node)), 1)


@op_rule(aten.matmul.default, aten.bmm.default)
def matmul(relations: Relations, node: Node) -> Labels:
    """A b: the summed axis changes inversely in a and b, rows of a and columns of b pass."""
    a, b = (relations.labels(operand) for operand in node.args[:2])  # type: ignore[arg-type]
    rank = len(sizes(node))
    if a.ndim < 2 or b.ndim < 2:
        return block(relations, node, "a product with a vector has no rule")
    a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))
    a, b = relations.collapse(a, rank - 2), relations.collapse(b, rank - 1) if _sums(a, b) else b
    left, right = a, np.swapaxes(b, -1, -2)  # the summed axis last in both
    if relations.kind is Kind.CENTRE:
        return block(relations, node, "its mean is read")
    if b.shape[-1] > 1:  # columns of b pass; then the sum runs over tokens
        relations.fix(a, "it weighs what another value brings")
        relations.tag(b, "value")
        axis = moving_axis(relations, b)
        if axis is not None:
            relations.row(rows_along(b, axis))
        return relations.collapse(b, rank - 2)
    relations.tag(left, "query_key")
    relations.tag(right, "query_key")
    if relations.unit is not Unit.CHANNEL and relations.kind not in FACTORS:
        left, right = (relations.collapse(x, rank - 1) for x in (left, right))
        relations.couple(left, right)
        relations.tag(left, "heads")
        return left
    relations.couple(left, right, inverse=relations.kind is Kind.SCALE)
    for side in (left, right):
        if side.shape[-1] > 1:
            relations.row(rows_along(side, rank - 1))
    return relations.fixed(rank)


def _sums(a: Labels, b: Labels) -> bool:
    """Whether the labels of `a` and `b` meet in the axis that is summed over."""
    return a.shape[-1] > 1 or b.shape[-2] > 1


@op_rule(fxopt.moe.default)
def experts(relations: Relations, node: Node) -> Labels:
    """Each expert's hidden axis changes by itself; all read and write one stream."""
    x, chosen, mixing, up, down, up_bias, down_bias, activation, gated = node.args
    if not all(_stored(w) for w in (up, down)):
        return block(relations, node, "its weights are computed in the graph")
    for routing in (chosen, mixing):
        relations.fix(relations.labels(routing), "it chooses and weighs the experts")
    if not _read(relations, x, relations.labels(x), up, 1, 2):
        return block(relations, node, "every head reads the same experts")
    out = relations.weight_axes(down, (1,))
    if down_bias is not None:
        shared_bias = relations.weight_axes(down_bias, (1,))
        relations.couple(out, shared_bias)
    rows, columns = relations.weight_axes(up, (0, 1)), relations.weight_axes(down, (0, 2))
    if up_bias is not None:
        relations.couple(rows, relations.weight_axes(up_bias, (0, 1)))
    _hidden(relations, rows, columns, str(activation), bool(gated))
    relations.row(columns)
    return _along(out, 2, 1)


def _hidden(
    relations: Relations, rows: Labels, columns: Labels, activation: str, gated: bool
) -> None:
    factor, sign = relations.kind is Kind.SCALE, relations.kind is Kind.SIGN
    gate, value = (rows[:, : columns.shape[1]], rows[:, columns.shape[1] :])
    linear_in_value = factor or sign
    if not gated:
        value = gate
        linear_in_value = (factor and activation in ("relu", "identity")) or (
            sign and activation in ("tanh", "identity")
        )
    if relations.kind in FACTORS:
        if gated:
            relations.fix(gate, "a nonlinear function reads it")
        if not linear_in_value:
            relations.fix(value, "a nonlinear function reads it")
        relations.couple(value, columns, inverse=factor)
    elif relations.kind in (Kind.ROTATE, Kind.CENTRE):
        relations.fix(rows, "a nonlinear function reads it")
        relations.fix(columns, "a nonlinear function reads it")
    else:
        relations.couple(value, columns)
        relations.couple(gate, columns)


@op_rule(aten.sum.dim_IntList, aten.mean.dim)
def reduce(relations: Relations, node: Node) -> Labels:
    """A sum over axes: linear in what stays, and a set for what is summed."""
    arguments: Any = node.args
    axes = arguments[1] if len(arguments) > 1 else None
    keep = bool(arguments[2] if len(arguments) > 2 else node.kwargs.get("keepdim", False))
    labels = relations.labels(arguments[0])
    axes = list(range(labels.ndim)) if not axes else [axis % labels.ndim for axis in axes]
    moving = moving_axis(relations, labels)
    summed = [axis for axis in axes if labels.shape[axis] > 1]
    if moving is not None and moving in summed and relations.kind not in FACTORS:
        relations.row(rows_along(labels, moving))
        if relations.kind in (Kind.ROTATE, Kind.CENTRE):
            relations.fix(labels, "its channels are summed")
        return relations.fixed(len(sizes(node)))
    for axis in summed:
        labels = relations.collapse(labels, axis)
    if keep:
        return labels
    return dropped(labels, axes)
