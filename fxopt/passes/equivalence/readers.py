"""The linears that read one activation, and what may be done to their weights."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.ir.program import Program, module_path

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """An activation and the linears with a stored weight that read it."""

    source: Node
    linears: tuple[Node, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights, each once."""
        return tuple(dict.fromkeys(str(linear.args[1].target) for linear in self.linears))  # type: ignore[union-attr]

    @property
    def path(self) -> str:
        """The modules that read it."""
        return ", ".join(dict.fromkeys(module_path(linear) for linear in self.linears))


def readers(program: Program) -> list[Reader]:
    """Every activation that linears with a stored weight read, in the order of the graph."""
    found: dict[Node, list[Node]] = {}
    for node in program.nodes(aten.linear.default):
        source, weight = node.args[0], node.args[1]
        if isinstance(source, Node) and isinstance(weight, Node) and weight.op == "get_attr":
            found.setdefault(source, []).append(node)
    return [Reader(source, tuple(linears)) for source, linears in found.items()]


def read_elsewhere(program: Program, reader: Reader) -> str | None:
    """Another operator that reads one of the weights, so that its columns may not be scaled."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in reader.weights:
            other = next((user for user in node.users if user not in reader.linears), None)
            if other is not None:
                untied = other.target is not aten.linear.default  # untie leaves those tied
                advice = "; run untie first" if untied else ""
                return f"{node.target} is also read by {other.name}{advice}"
    return None
