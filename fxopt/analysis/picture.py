"""Draw what a symmetry couples: the operators that its axis passes through, and its weights."""

from typing import Any

import networkx as nx
import numpy as np
import torch
from torch.fx import Node

from fxopt.analysis import op_rules
from fxopt.analysis.classes import solve
from fxopt.analysis.symmetry import Symmetry, relate
from fxopt.ir.program import Program
from fxopt.ir.text import operator_name

_JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)


def coupling_graph(program: Program, symmetry: Symmetry) -> Any:
    """The axis as a networkx graph: operators and weights, joined where a change passes.

    Nodes have `kind` ("operator", "weight" or "state"), `label`, and weights `inverse`.
    """
    relations = relate(program, symmetry.kind, symmetry.unit)
    classes = solve(relations)
    names = {(edit.name, edit.axes) for edit in symmetry.edits}
    member = np.zeros(classes.reason.size, dtype=np.bool_)
    for entry in relations.entries:
        if (entry.name, entry.axes) in names and entry.role == "weight":
            free = entry.labels[classes.free(entry.labels)]
            member[classes.of[free]] = True

    def follows(node: Node) -> bool:
        held = relations.values.get(node)
        parts = held if isinstance(held, list) else [] if held is None else [held]
        return any(bool(member[classes.of[part]].any()) for part in parts)

    graph: Any = nx.Graph()
    for node in program.graph.nodes:
        if node.op in ("call_function", "placeholder") and follows(node):
            kind = "state" if node.op == "placeholder" else "operator"
            label = node.name if kind == "state" else operator_name(node.target)
            graph.add_node(node.name, kind=kind, label=label, view=_is_view(node))
    edits = {edit.name: edit for edit in symmetry.weights}
    for node in program.graph.nodes:
        _connect(graph, node, edits)
    _drop_views(graph)
    return graph


def _connect(graph: Any, node: Node, edits: dict[str, Any]) -> None:
    for source in node.all_input_nodes:
        if source.op == "get_attr" and str(source.target) in edits:
            name = str(source.target)
            graph.add_node(name, kind="weight", label=name, inverse=edits[name].inverse)
            reader = node.name
            if reader not in graph:
                graph.add_node(reader, kind="operator", label=operator_name(node.target))
            graph.add_edge(name, reader)
        if source.name in graph and node.name in graph:
            graph.add_edge(source.name, node.name)
        elif source.name in graph and any(str(s.target) in edits for s in node.all_input_nodes):
            graph.add_node(node.name, kind="operator", label=operator_name(node.target))
            graph.add_edge(source.name, node.name)


def _is_view(node: Node) -> bool:
    """Whether an operator only moves an axis about; such are left out of a picture."""
    rule = op_rules.rule_of(node.target)
    return (
        rule is not None
        and rule.__module__ == op_rules.views.__name__
        and node.target not in _JOINS
    )


def _drop_views(graph: Any) -> None:
    for name in list(graph.nodes):
        if graph.nodes[name].get("view", False):
            near = list(graph.neighbors(name))
            graph.remove_node(name)
            graph.add_edges_from((a, b) for a in near for b in near if a < b)


def mermaid(graph: Any) -> str:
    """A coupling graph as a mermaid flowchart; inverse weights are drawn as hexagons."""
    shapes = {"operator": ("([", "])"), "state": ("[(", ")]"), "weight": ("[", "]")}
    numbers = {name: f"n{index}" for index, name in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for name, facts in graph.nodes(data=True):
        left, right = ("{{", "}}") if facts.get("inverse") else shapes[facts["kind"]]
        lines.append(f'    {numbers[name]}{left}"{facts["label"]}"{right}')
    lines += [f"    {numbers[a]} --- {numbers[b]}" for a, b in graph.edges]
    return "\n".join(lines)
