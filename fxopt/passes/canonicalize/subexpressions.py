"""Compute equal things once.

    f(x, 1), f(x, 1)   =   y, y   where y = f(x, 1)

Shapes: any.
Exactness: bit-equal; random and writing operators are never merged.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.passes.canonicalize.functional import is_mutable
from fxopt.passes.canonicalize.results import is_result_copy

aten = torch.ops.aten


def merge_equal(program: Program) -> int:
    """Let every reader of a repeated computation read the first; returns how many went."""
    first: dict[Hashable, Node] = {}
    merged = 0
    for node in list(program.graph.nodes):
        if not _can_merge(node):
            continue
        known = first.setdefault(_key(node), node)
        if known is not node:
            node.replace_all_uses_with(known)
            program.graph.erase_node(node)
            merged += 1
    return merged


def _can_merge(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    writes_or_copies = is_mutable(node) or is_result_copy(node)
    return node.op == "call_function" and not random and not writes_or_copies


def _key(node: Node) -> Hashable:
    size = node.meta.get("val")
    if node.target is aten.sym_size.int and isinstance(size, torch.SymInt):
        return "size", size.node.expr  # one size, whichever tensor is asked for it
    return node.op, node.target, _frozen(node.args), _frozen(dict(node.kwargs))


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, slice):
        return slice, _frozen((value.start, value.stop, value.step))
    # 1, 1.0 and True are equal and hash alike, but compute different dtypes; 0.0 is not -0.0.
    return type(value), str(value) if isinstance(value, float) else value
