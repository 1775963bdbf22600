"""Sums, products and functions of single elements."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.op_rules.broadcast import FACTORS, join
from fxopt.analysis.op_rules.registry import op_rule
from fxopt.analysis.relations import Kind, Labels, Relations, sizes

aten = torch.ops.aten
_NOT_LINEAR = "a nonlinear function reads it"


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node with a tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def block(relations: Relations, node: Node, text: str) -> Labels:
    """Nothing that the node reads may change."""
    for operand in node.all_input_nodes:
        if is_tensor(operand):
            relations.fix(relations.labels(operand), text)
    return relations.fixed(len(sizes(node)))


# --- sums and products --------------------------------------------------------------------------


@op_rule(aten.add.Tensor, aten.sub.Tensor, by_element=True)
def add(relations: Relations, node: Node) -> Labels:
    """X + y: both operands and the result change alike."""
    a, b = node.args[0], node.args[1]
    if is_tensor(a) and is_tensor(b):
        labels = join(relations, [a, b], len(sizes(node)), multiply=False)
        if not any(operand in relations.from_weights for operand in (a, b)):
            relations.tag(labels, "residual")
        return labels
    return add_number(relations, node)


def add_number(relations: Relations, node: Node) -> Labels:
    """X + c: a weight takes a factor up as (w + c) s - c, anything else cannot."""
    x: Any = node.args[0] if is_tensor(node.args[0]) else node.args[1]
    number: Any = node.args[1] if x is node.args[0] else node.args[0]
    source = _weight_behind(x)
    plain = node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1
    if relations.kind in FACTORS and source is not None and plain:
        return relations.elementwise_weight(source, float(number))
    labels = relations.labels(x)
    if relations.kind in (*FACTORS, Kind.ROTATE, Kind.CENTRE):
        relations.fix(labels, "a number is added to it")
        return relations.fixed(len(sizes(node)))
    return labels


def _weight_behind(node: Node) -> Node | None:
    while node.op == "call_function" and node.target is aten.to.dtype:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.op == "get_attr" else None


@op_rule(aten.mul.Tensor, by_element=True)
def mul(relations: Relations, node: Node) -> Labels:
    """X y: factors multiply, places meet."""
    operands = [argument for argument in node.args[:2] if is_tensor(argument)]
    return join(relations, operands, len(sizes(node)), multiply=True)


@op_rule(aten.div.Tensor, by_element=True)
def div(relations: Relations, node: Node) -> Labels:
    """X / y: as a product for places; factors pass only where the divisor has none."""
    operands = [argument for argument in node.args[:2] if is_tensor(argument)]
    if relations.kind in FACTORS and (len(operands) == 2 or operands[0] is not node.args[0]):
        relations.fix(relations.labels(operands[-1]), "something is divided by it")
        operands = operands[:1] if operands[0] is node.args[0] else []
        if not operands:
            return relations.fixed(len(sizes(node)))
    return join(relations, operands, len(sizes(node)), multiply=True)


@op_rule(aten.where.self, by_element=True)
def where(relations: Relations, node: Node) -> Labels:
    """C ? x : y: both choices change alike, and the condition changes place with them."""
    rank = len(sizes(node))
    condition, *choices = node.args
    if relations.kind in (*FACTORS, Kind.ROTATE, Kind.CENTRE):
        relations.fix(relations.labels(condition), "it decides which of two values is taken")
        if relations.kind in (Kind.ROTATE, Kind.CENTRE):
            return block(relations, node, "channels are chosen one by one")
        return join(relations, choices, rank, multiply=False)
    return join(relations, [*choices, condition], rank, multiply=False)


@op_rule(aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, by_element=True)
def fill(relations: Relations, node: Node) -> Labels:
    """C ? x : number: a factor passes where the number is zero, or infinite and it is positive."""
    tensors = [argument for argument in node.args if is_tensor(argument)]
    numbers: Any = [argument for argument in node.args if isinstance(argument, int | float)]
    if relations.kind in (Kind.ROTATE, Kind.CENTRE):
        return block(relations, node, "channels are overwritten one by one")
    if relations.kind not in FACTORS:
        return join(relations, tensors, len(sizes(node)), multiply=False)
    infinite = relations.kind is Kind.SCALE and all(math.isinf(n) for n in numbers)
    if not infinite and any(n != 0 for n in numbers):
        return block(relations, node, "some of its elements are overwritten by a number")
    is_fill = node.target is aten.masked_fill.Scalar
    x, condition = tensors if is_fill else reversed(tensors)
    relations.fix(relations.labels(condition), "it decides which of two values is taken")
    return join(relations, [x], len(sizes(node)), multiply=False)


# --- functions of one element -------------------------------------------------------------------


def unary(*passing: Kind) -> Callable[[Relations, Node], Labels]:
    """A rule for f(x): places always pass, the kinds in `passing` too, others stop."""

    def rule(relations: Relations, node: Node) -> Labels:
        labels = relations.labels(node.args[0])
        if relations.kind in (Kind.PERMUTE, Kind.SLICE, *passing):
            return labels
        relations.fix(labels, _NOT_LINEAR)
        return relations.fixed(labels.ndim)

    return rule


_LINEAR = (Kind.SCALE, Kind.SIGN, Kind.ROTATE, Kind.CENTRE)
for _target in (
    aten.neg.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
):
    op_rule(_target, by_element=True)(unary(*_LINEAR))
for _target in (aten.relu.default, aten.leaky_relu.default):  # f(s x) = s f(x) for s > 0
    op_rule(_target, by_element=True)(unary(Kind.SCALE))
op_rule(aten.abs.default, by_element=True)(unary(Kind.SCALE))
for _target in (aten.tanh.default, aten.sin.default, aten.erf.default):  # f(-x) = -f(x)
    op_rule(_target, by_element=True)(unary(Kind.SIGN))
for _target in (
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.mish.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.softplus.default,
    aten.elu.default,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.cos.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.clamp.default,
    aten.bitwise_not.default,
    aten.logical_not.default,
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
):
    op_rule(_target, by_element=True)(unary())


@op_rule(aten.to.dtype, by_element=True)
def convert(relations: Relations, node: Node) -> Labels:
    """A change of dtype: linear between floating types."""
    labels = relations.labels(node.args[0])
    source: Any = node.args[0]
    if source.meta["val"].is_floating_point() and node.meta["val"].is_floating_point():
        return labels
    return unary()(relations, node)


@op_rule(
    aten.maximum.default,
    aten.minimum.default,
    aten.eq.Tensor,
    aten.le.Tensor,
    aten.lt.Tensor,
    aten.ge.Tensor,
    aten.gt.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    by_element=True,
)
def compare(relations: Relations, node: Node) -> Labels:
    """f(x, y) element by element: places pass."""
    if relations.kind not in (Kind.PERMUTE, Kind.SLICE):
        return block(relations, node, _NOT_LINEAR)
    operands = [argument for argument in node.args[:2] if is_tensor(argument)]
    return join(relations, operands, len(sizes(node)), multiply=True)
