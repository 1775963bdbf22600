"""Build nodes that carry their shape, dtype and provenance from the moment they exist."""

from collections.abc import Iterator
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
        return self.weight(free_name(self.program, name), value)

    def equal_weight(self, name: str, value: torch.Tensor) -> Node:
        """A tensor that is held under a name made from `name` where it is equal, else a new one."""
        held = self.program.weights()
        name = next(n for n in _numbered(name) if n not in held or _equal(held[n], value))
        return self.read(name) if name in held else self.weight(name, value)

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


def free_name(program: Program, name: str) -> str:
    """`name`, or with a number behind it where the program holds one already."""
    held = program.weights()
    return next(candidate for candidate in _numbered(name) if candidate not in held)


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}_{number}"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _plain_name(target: Any) -> str | None:
    """The operator's own name, so that a graph reads `rms_norm`, not `rms_norm_default`."""
    schema = getattr(target, "_schema", None)
    return None if schema is None else schema.name.rpartition("::")[2]


def first_call(program: Program) -> Node:
    """The first node that is neither an input nor a weight."""
    return next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
