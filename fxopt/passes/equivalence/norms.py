"""The norms of a program, their gains as numbers, and what stands behind them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.op_rules.norms import gain_value
from fxopt.ir.program import Program, module_path

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """A layer norm or rms norm with a gain that is a weight, or a weight plus a number."""

    node: Node
    gain: str | None  # the weight's name
    shift: str | None  # the bias's name
    value: Tensor  # the gain in float64 as the norm uses it

    @property
    def path(self) -> str:
        """The module it came from."""
        return module_path(self.node) or self.node.name


def norms(program: Program) -> list[Norm]:
    """All norms over the last axis."""
    found: list[Norm] = []
    for node in program.nodes(aten.rms_norm.default, aten.layer_norm.default):
        gain: Any = node.args[2] if len(node.args) > 2 else None
        layer = node.target is aten.layer_norm.default
        bias: Any = node.args[3] if layer and len(node.args) > 3 else None
        value = gain_value(program, gain)
        name = weight_behind(gain)
        shift = str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None
        found.append(Norm(node, name, shift, torch.ones(1) if value is None else value))
    return found


def group_by_gain(found: list[Norm]) -> dict[str, list[Norm]]:
    """The norms of each gain: a module that is called twice is two norms."""
    groups: dict[str, list[Norm]] = {}
    for norm in found:
        if norm.gain is not None:
            groups.setdefault(norm.gain, []).append(norm)
    return groups


def weight_behind(value: Any) -> str | None:
    """The weight that a gain is made from."""
    while isinstance(value, Node) and value.op == "call_function" and value.args:
        value = value.args[0]
    return str(value.target) if isinstance(value, Node) and value.op == "get_attr" else None


def reads_only_linear(node: Node) -> bool:
    """Whether every reader of a node is a linear with a stored weight."""
    return all(
        user.target is aten.linear.default
        and user.args[0] is node
        and isinstance(user.args[1], Node)
        and user.args[1].op == "get_attr"
        for user in node.users
    )


def read_by_norms_alone(alike: list[Norm]) -> bool:
    """Whether the gain of some norms is read as their gain and in no other way."""
    pending: list[Any] = [norm.node.args[2] for norm in alike]
    nodes, seen = {norm.node for norm in alike}, set[Node]()
    while pending:
        value = pending.pop()
        if not isinstance(value, Node) or value in seen:
            continue
        seen.add(value)
        if any(user not in nodes and user not in seen for user in value.users):
            return False
        pending += value.all_input_nodes
    return True


def fold_bias(program: Program, norm: Norm) -> bool:
    """Put c <- c + W b and b <- 0, where each linear behind the norm has a bias of its own."""
    if norm.shift is None or not reads_only_linear(norm.node) or not norm.node.users:
        return False
    shift = program.weight(norm.shift).double()
    linears = list(norm.node.users)
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in linears]
    stored = [b for b in biases if isinstance(b, Node) and b.op == "get_attr" and len(b.users) == 1]
    alone = len(_node(program, norm.shift).users) == 1
    if not bool((shift != 0).any()) or len(stored) != len(linears) or not alone:
        return False
    for linear, bias in zip(linears, stored, strict=True):
        weight = program.weight(str(linear.args[1].target))  # type: ignore[union-attr]
        old = program.weight(str(bias.target))
        moved = old.double() + weight.double() @ shift
        program.set_weight(str(bias.target), moved.to(old.dtype))
    program.set_weight(norm.shift, torch.zeros_like(program.weight(norm.shift)))
    return True


def _node(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
