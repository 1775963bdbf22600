"""Values that are the same all along an axis, or in both channels of each pair."""

from collections.abc import Callable
from typing import Any

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
    return _follows(value, lambda node: _sources(program, node, from_end))


def same_in_pairs(program: Program, value: Node, interleaved: bool) -> bool:
    """Whether the last axis says the same to both channels that rotary embedding turns together.

    A pair is (2i, 2i + 1) if interleaved, else (i, i + half).
    """
    return _follows(value, lambda node: _sources_in_pairs(program, node, interleaved))


def _follows(value: Node, sources_of: Callable[[Node], list[Node] | None]) -> bool:
    """Whether what is asked of a value follows from what it is computed from."""
    pending, seen = [value], {value}
    while pending:
        sources = sources_of(pending.pop())
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


def _sources_in_pairs(program: Program, node: Node, interleaved: bool) -> list[Node] | None:
    """The tensors whose pairs have to be alike for a node's to be; None where nothing is known."""
    last = len(sizes(node)) - 1
    if last < 0 or sizes(node)[last] == 1 or node.target in _FILLS or _repeats(node, interleaved):
        return []
    stored = program.constant(node)
    if stored is not None:
        first, second = pair(stored, interleaved)
        return [] if bool((first == second).all()) else None
    if _by_element(node, -1):
        return [source for source in node.all_input_nodes if is_tensor(source)]
    return None


def pair(x: Any, interleaved: bool) -> tuple[Any, Any]:
    """The channels [..., R] that rotary embedding turns together, as two [..., R / 2]."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _repeats(node: Node, interleaved: bool) -> bool:
    """Whether a node writes each angle twice, to where the two channels of its pair stand."""
    last = (-1, len(sizes(node)) - 1)
    if interleaved:
        return node.target is aten.repeat_interleave.self_int and node.args[1:] in (
            (2, last[0]),
            (2, last[1]),
        )
    if node.target is not aten.cat.default or node.args[1:] not in ((last[0],), (last[1],)):
        return False
    pieces: Any = node.args[0]
    return len(pieces) == 2 and pieces[0] is pieces[1]


def _by_element(node: Node, axis: int) -> bool:
    """Whether a place of the axis, counted from the end, depends on that place of operands only."""
    if node.target is aten.unsqueeze.default:
        rank, added = len(sizes(node)), int(node.args[1])  # type: ignore[arg-type]
        return added % rank < rank + axis
    return is_by_element(node.target)
