"""Split an encoder-decoder's graph: what is computed once per text, and what per token.

Everything that depends on none of the step's inputs (decoder tokens, cache) belongs to the first
stage: the encoder, and the cross-attention keys and values of every decoder layer with it. No
layer is named; the split follows the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxopt.ir.program import Program, has_effect
from fxopt.ir.runner import Runner

aten = torch.ops.aten


@dataclass(frozen=True)
class Stages:
    """Two graphs that share their weights.

    `source` takes the inputs read once and returns the tensors in `carried`; `step` takes the
    carried tensors, then the step's inputs, and returns the program's outputs. `expands` tells
    which carried tensors have a row per text, and so are repeated for beams.
    """

    source: nn.Module
    step: nn.Module
    source_inputs: tuple[str, ...]
    step_inputs: tuple[str, ...]
    carried: tuple[str, ...]
    expands: tuple[bool, ...]
    hidden: int  # which carried tensor is the encoder's last hidden state


def split_stages(program: Program, prepare: Callable[[Runner], nn.Module]) -> Stages:
    """Split by dependence on `signature.step_inputs`; `prepare` is given both halves."""
    program = program.clone()
    graph = program.graph
    steps = set(program.signature.step_inputs)
    _read_sizes_from_source(graph, steps)
    moving: set[Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.name in steps) or any(
            source in moving for source in node.all_input_nodes
        ):
            moving.add(node)
    output = graph.output_node()
    carried = _carried(program, moving, output)
    source = _source_graph(graph, carried)
    step, step_inputs = _step_graph(graph, carried, moving)
    batch = _batch_hint(graph)
    root = program.graph_module
    return Stages(
        source=prepare(Runner(GraphModule(root, source, "FxoptSource"))),
        step=prepare(Runner(GraphModule(root, step, "FxoptStep"))),
        source_inputs=tuple(n.name for n in source.nodes if n.op == "placeholder"),
        step_inputs=step_inputs,
        carried=tuple(node.name for node in carried),
        expands=tuple(_is_dynamic(node) and _hint(node, 0) == batch for node in carried),
        hidden=_hidden(program, carried),
    )


def _read_sizes_from_source(graph: Graph, steps: set[str]) -> None:
    """Read a size that inputs of both stages have, the batch for one, from the first stage's.

    The tracer takes it from either, and an encoder would seem to depend on the decoder's tokens.
    """
    known: dict[str, tuple[Node, int]] = {}
    for node in graph.nodes:
        value = _value(node)
        if node.op == "placeholder" and node.name not in steps and isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if type(size) is not int:
                    known.setdefault(str(size), (node, axis))
    for node in graph.nodes:
        if node.target is aten.sym_size.int and node.args[0].name in steps:
            node.args = known.get(str(node.meta["val"]), node.args)


def _carried(program: Program, moving: set[Node], output: Node) -> list[Node]:
    """First-stage tensors that the second stage or the caller reads."""
    carried: list[Node] = []
    for node in program.graph.nodes:
        if node.op == "get_attr" or node in moving or not isinstance(_value(node), Tensor):
            continue
        if any(user in moving or user is output for user in node.users):
            carried.append(node)
    return carried


def _value(node: Node) -> object:
    return node.meta.get("val")


def _hint(node: Node, axis: int) -> int | None:
    value = _value(node)
    if not isinstance(value, Tensor) or value.dim() <= axis:
        return None
    size: Any = value.shape[axis]
    return size if type(size) is int else size.node.hint


def _is_dynamic(node: Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.dim() > 0 and type(value.shape[0]) is not int


def _batch_hint(graph: Graph) -> int | None:
    first = next(node for node in graph.nodes if node.op == "placeholder")
    return _hint(first, 0)


def _hidden(program: Program, carried: list[Node]) -> int:
    """The carried tensor that the program also returns; it stands for the encoder's output."""
    results: tuple[Node, ...] = program.graph.output_node().args[0]  # type: ignore[assignment]
    for result in results:
        if result in carried:
            return carried.index(result)
    return 0


def _source_graph(graph: Graph, carried: list[Node]) -> Graph:
    source = Graph()
    needed: set[Node] = set()
    stack = list(carried)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = source.node_copy(node, lambda n: copies[n])
    source.output(tuple(copies[node] for node in carried))
    return source


def _step_graph(
    graph: Graph, carried: list[Node], moving: set[Node]
) -> tuple[Graph, tuple[str, ...]]:
    step = Graph()
    copies: dict[Node, Node] = {}
    for node in carried:
        placeholder = step.placeholder(node.name)
        placeholder.meta = dict(node.meta)
        copies[node] = placeholder
    names: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node in moving:
            copies[node] = step.node_copy(node)
            names.append(node.name)
    sizes = _SizeSource(step, [n for n in graph.nodes if n in copies], copies)
    for node in graph.nodes:
        if node in copies or node.op == "output":
            continue
        if node.op == "get_attr":
            copies[node] = step.node_copy(node)
        elif node in moving:
            copies[node] = step.node_copy(node, lambda n: copies[n])
        elif not isinstance(_value(node), Tensor):
            # Sizes are worked out again: beams have more rows than the encoder saw.
            sizes.copy(node)
    results = map_arg(graph.output_node().args[0], lambda n: copies[n])
    step.output(results)
    step.eliminate_dead_code(has_effect)
    return step, tuple(names)


class _SizeSource:
    """Re-derives sizes of first-stage tensors from tensors that the step has."""

    def __init__(self, step: Graph, available: list[Node], copies: dict[Node, Node]) -> None:
        self.step = step
        self.copies = copies
        self.by_symbol: dict[str, tuple[Node, int]] = {}
        for node in available:
            value = _value(node)
            shape: Any = value.shape if isinstance(value, Tensor) else ()
            for axis, size in enumerate(shape):
                if type(size) is not int:
                    self.by_symbol.setdefault(str(size), (node, axis))
                    if size.node.hint is not None:
                        self.by_symbol.setdefault(f"#{size.node.hint}", (node, axis))

    def copy(self, node: Node) -> None:
        """Copy a first-stage node that is a number, if the step can work it out."""
        if node.target is aten.sym_size.int:
            size = node.meta["val"]
            hint = f"#{size if type(size) is int else size.node.hint}"
            found = self.by_symbol.get(str(size), self.by_symbol.get(hint))
            if found is not None:
                tensor, axis = found
                copied = self.step.call_function(aten.sym_size.int, (self.copies[tensor], axis))
                copied.meta = dict(node.meta)
                self.copies[node] = copied
        elif all(source in self.copies for source in node.all_input_nodes):
            self.copies[node] = self.step.node_copy(node, lambda n: self.copies[n])
