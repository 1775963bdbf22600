"""Give the caller results to write into, as the model does.

    return x + 0   =   return clone(x)

Dropping what computes nothing, merging what is equal and folding constants let a result share
its memory with an input, a weight or another result. Inside the graph nothing writes; the caller
may, and would change the weights for good. Such a result is copied, unless the model itself
returned that memory. Weights are always copied: a caller who wrote to one would change what this
program computes, not the model. Caches are state, handed on from step to step, and stay.

Shapes: any.
Exactness: bit-equal.
"""

import torch
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.passes.canonicalize.functional import views_above
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.pattern import packet_of

aten = torch.ops.aten

# Results, by their index, and what they share memory with: a node, or an earlier result.
Shared = set[tuple[int, str | int]]


def is_result_copy(node: Node) -> bool:
    """Whether a call does nothing but give a result memory of its own."""
    return node.target is aten.clone.default and all(user.op == "output" for user in node.users)


def shared_results(program: Program) -> Shared:
    """What the results of a model share with its inputs and with each other."""
    return _shared([_memory(node, made_contiguous=True) for node in _results(program)])


def separate_results(program: Program, allowed: Shared, made_by: str) -> None:
    """Copy each result that shares more than is allowed, and no other."""
    output = program.graph.output_node()
    build = Builder(program, output, f"{made_by}/results")
    for copy in [node for node in _results(program) if is_result_copy(node)]:
        returned = output.args
        output.replace_input_with(copy, copy.all_input_nodes[0])
        if _excess(program, allowed):
            output.args = returned
        erase_dead([copy])
    for index in range(len(_results(program))):
        if index in _excess(program, allowed):
            _copy(build, output, index, allowed)


def _copy(build: Builder, output: Node, index: int, allowed: Shared) -> None:
    returned: list[Node] = list(output.args[0])  # type: ignore[arg-type]
    node = returned[index]
    copy = build.call(aten.clone.default, node)
    for place, other in enumerate(returned):
        if place == index or (other is node and (place, index) in allowed):
            returned[place] = copy
    output.args = (returned,)


def _excess(program: Program, allowed: Shared) -> set[int]:
    """The results that share memory and should not."""
    shared = _shared([_memory(node) for node in _results(program)])
    weights = {node.name for node in program.graph.nodes if node.op == "get_attr"}
    return {index for index, other in shared if other in weights or (index, other) not in allowed}


def _shared(memories: list[Node]) -> Shared:
    shared: Shared = set()
    for index, memory in enumerate(memories):
        if memory.op in ("placeholder", "get_attr"):
            shared.add((index, memory.name))
        shared |= {(index, i) for i in range(index) if memories[i] is memory}
    return shared


def _memory(node: Node, made_contiguous: bool = False) -> Node:
    """The node that made the memory which another may be a view of.

    `made_contiguous`: `contiguous` is taken to copy, which a model that calls it may count on.
    """
    chain = views_above(node)
    copies = (view for view in chain if packet_of(view) is aten.contiguous)
    return next(copies, chain[-1]) if made_contiguous else chain[-1]


def _results(program: Program) -> list[Node]:
    """The tensors that a program returns, its caches left out."""
    returned: list[Node] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    cache = program.signature.cache
    return returned[: len(returned) - (cache.count if cache else 0)]
