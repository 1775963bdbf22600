"""Values that are the same all along an axis, whatever their shape says."""

import torch
from torch.fx import Node

from fxopt.analysis.op_rules.elementwise import is_tensor
from fxopt.analysis.op_rules.registry import is_by_element
from fxopt.analysis.relations import sizes
from fxopt.ir.program import Program

aten = torch.ops.aten
_FILLS = (
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)


def same_along(program: Program, value: Node, axis: int) -> bool:
    """Whether a tensor is the same at every place of an axis: filled, stored so, or repeated."""
    from_end = axis - len(sizes(value))  # operands of other ranks are aligned at their last axis
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        sources = _sources(program, node, from_end)
        if sources is None:
            return False
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return True


def _sources(program: Program, node: Node, axis: int) -> list[Node] | None:
    """The tensors that have to be the same for a node to be; None where nothing is known."""
    shape = sizes(node)
    if len(shape) < -axis or shape[axis] == 1 or node.target in _FILLS:
        return []
    stored = program.constant(node)
    if stored is not None:
        return [] if bool((stored == stored.narrow(axis, 0, 1)).all()) else None
    if _by_element(node, axis):
        return [source for source in node.all_input_nodes if is_tensor(source)]
    return None


def _by_element(node: Node, axis: int) -> bool:
    """Whether a place of the axis, counted from the end, depends on that place of operands only."""
    if node.target is aten.unsqueeze.default:
        rank, added = len(sizes(node)), int(node.args[1])  # type: ignore[arg-type]
        return added % rank < rank + axis
    return is_by_element(node.target)
