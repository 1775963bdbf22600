"""Compute parametrized weights once, as `remove_parametrizations` does before inference.

    weight = f(parametrizations.weight.original0, ...)      (weight norm, orthogonal, spectral, ...)

The graph reads `weight` under the name that the module has it under, and no f.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxopt.capture.tensors import named_tensors
from fxopt.ir.program import assign_weight, has_effect

_MARK = ".parametrizations."


def compute_parametrized_weights(graph_module: GraphModule) -> None:
    """Replace what is computed from parametrized tensors alone by the weight that it comes to."""
    graph, values = graph_module.graph, _values(graph_module)
    made: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        readers = [user for user in node.users if user not in values]
        if node not in values or node.op == "get_attr" or not readers:
            continue
        name = _name(graph_module, node, values[node], made)
        if name not in made:
            assign_weight(graph_module, name, values[node])
            made[name] = values[node]
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        read.meta = {**node.meta, "module_path": name.rpartition(".")[0]}
        for user in readers:
            user.replace_input_with(node, read)
    graph.eliminate_dead_code(has_effect)
    _drop_unread(graph_module)
    graph_module.recompile()


def _drop_unread(graph_module: GraphModule) -> None:
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in named_tensors(graph_module)]:
        if _MARK in f".{name}" and name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)


def _values(graph_module: GraphModule) -> dict[Node, Any]:
    """What each node is that depends on parametrized tensors, and on nothing else."""
    values: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and _MARK in f".{node.target}":
            values[node] = operator.attrgetter(str(node.target))(graph_module).detach()
        elif node.op == "call_function" and _follows(node, values):
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            args: Any = map_aggregate(node.args, lambda a: values.get(a, a))  # type: ignore[arg-type]
            with torch.no_grad():
                values[node] = function(*args, **node.kwargs)
    return values


def _follows(node: Node, values: dict[Node, Any]) -> bool:
    sources = node.all_input_nodes
    pure = torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
    return bool(sources) and pure and all(source in values for source in sources)


def _name(graph_module: GraphModule, node: Node, value: Tensor, made: dict[str, Tensor]) -> str:
    """`conv.weight` for what is made of `conv.parametrizations.weight.original0`.

    A module that is called twice computes the same twice.
    """
    origin = node
    while origin.op != "get_attr":
        origin = origin.all_input_nodes[0]
    owner, _, rest = f".{origin.target}".partition(_MARK)
    stem = f"{owner}.{rest.split('.')[0]}".lstrip(".")
    names = itertools.chain([stem], (f"{stem}_{count}" for count in itertools.count(1)))
    held = [f"{name}." for name, _ in named_tensors(graph_module)]

    def fits(name: str) -> bool:
        if name in made:
            return torch.equal(made[name], value)
        return not any(other.startswith(f"{name}.") for other in held)

    return next(name for name in names if fits(name))
