"""Weights that are stored as codes: which nodes only read them, and the values they give."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.ir.program import Program

aten = torch.ops.aten
ops = torch.ops.fxopt
# From codes to values, in the order in which they can stand: unpack, look up, scale, set outliers.
_STEPS = (ops.unpack.default, ops.lookup.default, ops.dequantize.default, aten.put.default)


def is_stored_weight(node: Any) -> bool:
    """Whether a node computes a weight's values from stored codes and nothing else."""
    return (
        isinstance(node, Node)
        and node.target in _STEPS
        and all(
            source.op == "get_attr" or is_stored_weight(source) for source in node.all_input_nodes
        )
    )


def stored_weights(program: Program) -> Iterator[Node]:
    """The nodes that give the values of stored weights to the rest of the graph."""
    for node in program.nodes(*_STEPS):
        if is_stored_weight(node) and not all(is_stored_weight(user) for user in node.users):
            yield node


def stored_values(program: Program, node: Node) -> Tensor:
    """The values of a stored weight."""
    if node.op == "get_attr":
        return program.weight(str(node.target))
    args: Any = map_arg(node.args, lambda source: stored_values(program, source))
    target: Any = node.target
    return target(*args, **node.kwargs)


def code_names(node: Node) -> Iterator[str]:
    """The names of the tensors that a stored weight is read from, codes first."""
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield str(source.target)
        else:
            yield from code_names(source)
