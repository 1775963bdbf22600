"""Build nodes that carry their shape, dtype and provenance from the moment they exist."""

from itertools import count
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.program import Program, shape_of
from fxopt.rewrite.sizes import fixed

aten = torch.ops.aten


class Builder:
    """Inserts nodes before a given one and records what they return.

    Provenance follows the node that is being replaced: the new nodes belong to the same module
    of the model, and `meta["from_node"]` says which pass and rule made them from which node.
    """

    def __init__(self, program: Program, before: Node, made_by: str) -> None:
        self.program = program
        self.before = before
        self.made_by = made_by
        self.created: list[Node] = []
        self._mode = fake_mode(program)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call; `target` is an operator overload."""
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.create_node(
                "call_function", target, args, kwargs, name=_plain_name(target)
            )
        node.meta["val"] = infer(node, self._mode)
        return self._stamp(node)

    def size(self, node: Node, axis: int) -> int | Node:
        """The size of an axis: a number where it is fixed, else the node that asks for it."""
        size = fixed(shape_of(node)[axis])
        axis %= len(shape_of(node))
        return self.call(aten.sym_size.int, node, axis) if size is None else size

    def weight(self, name: str, value: torch.Tensor, path: str | None = None) -> Node:
        """Store a tensor under `name` and insert the node that reads it."""
        self.program.set_weight(name, value)
        return self.read(name, path)

    def new_weight(self, name: str, value: torch.Tensor) -> Node:
        """Store a tensor under a name that nothing has yet, made from `name`."""
        known = self.program.weights()
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        return self.weight(next(free for free in names if free not in known), value)

    def read(self, name: str, path: str | None = None) -> Node:
        """The node that reads a stored tensor; an existing one is used again if it can be."""
        graph = self.program.graph
        for node in graph.find_nodes(op="get_attr", target=name):
            if node < self.before:
                return node
        with graph.inserting_before(first_call(self.program)):
            node = graph.create_node("get_attr", name)
        node.meta["val"] = self._mode.from_tensor(self.program.weight(name), static_shapes=True)
        stamped = self._stamp(node)
        stamped.meta["module_path"] = name.rpartition(".")[0] if path is None else path
        return stamped

    def _stamp(self, node: Node) -> Node:
        node.meta["module_path"] = self.before.meta.get("module_path", "")
        origin = {"node": self.before.name, "pass": self.made_by}
        node.meta["from_node"] = [*self.before.meta.get("from_node", []), origin]
        self.created.append(node)
        return node


def _plain_name(target: Any) -> str | None:
    """The operator's own name, so that a graph reads `rms_norm`, not `rms_norm_default`."""
    schema = getattr(target, "_schema", None)
    return None if schema is None else schema.name.rpartition("::")[2]


def first_call(program: Program) -> Node:
    """The first node that is neither an input nor a weight."""
    return next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
