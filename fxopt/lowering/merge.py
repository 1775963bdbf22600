"""Linears that read the same activation become one: one quantization, one product."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, Site, module_path, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead

aten = torch.ops.aten
ops = torch.ops.fxopt


@dataclass(frozen=True)
class MergedRows:
    """Where the rows of a weight went: `merged[start : start + rows]`."""

    weight: str
    merged: str
    start: int


def merge_siblings(program: Program) -> tuple[list[Site], list[MergedRows]]:
    """Merge `dynamic_linear_w8a8` and `linear_w8a16` nodes that share their input.

    The rows of their weights are stored one after the other; `share_rows` then makes the
    originals views of them, so that nothing is held twice.
    """
    sites: list[Site] = []
    rows: list[MergedRows] = []
    for target in (ops.dynamic_linear_w8a8.default, ops.linear_w8a16.default):
        groups: dict[Any, list[Node]] = defaultdict(list)
        for node in program.nodes(target):
            x, *parts, activation = node.args
            if activation == "none" and _mergeable(parts):
                groups[x, tuple(part is None for part in parts)].append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                sites += _merge(program, target, nodes, rows)
    return sites, rows


def _mergeable(parts: list[Any]) -> bool:
    # A weight that others read too (a tied one) must stay where it is.
    return all(
        part is None
        or (isinstance(part, Node) and part.op == "get_attr" and len(part.users) == 1)
        for part in parts
    )


def _merge(
    program: Program, target: Any, nodes: list[Node], rows: list[MergedRows]
) -> list[Site]:
    first = nodes[0]
    build = Builder(program, first, "lower/merge_siblings")
    x, *parts, activation = first.args
    stacked = [
        _stack(build, [node.args[i + 1] for node in nodes], rows) for i in range(len(parts))
    ]
    merged = build.call(target, x, *stacked, activation)
    start = 0
    sites: list[Site] = []
    for node in nodes:
        width = shape_of(node)[-1]
        part = build.call(aten.slice.Tensor, merged, len(shape_of(node)) - 1, start, start + width)
        part.meta["module_path"] = module_path(node)
        start += width
        # A slice of the merged rows is strided; `reshape` takes it where `view` might not.
        for user in list(node.users):
            if user.target is aten.view.default:
                user.target = aten.reshape.default
        node.replace_all_uses_with(part)
        sites.append(Site(module_path(node), f"merged with {len(nodes) - 1} siblings", node.name))
    erase_dead(nodes)
    return sites


def _stack(build: Builder, parts: list[Any], rows: list[MergedRows]) -> Node | None:
    if parts[0] is None:
        return None
    names = [str(part.target) for part in parts]
    values = [build.program.weight(name) for name in names]
    merged = f"{names[0]}_merged"
    start = 0
    for name, value in zip(names, values, strict=True):
        rows.append(MergedRows(name, merged, start))
        start += value.shape[0]
    return build.weight(merged, torch.cat(values))


def share_rows(program: Program, lowered: Program, rows: list[MergedRows]) -> None:
    """Let the weights of `program` be views of the merged ones that `lowered` holds."""
    mine, theirs = program.weights(), lowered.weights()
    for row in rows:
        value, merged = mine.get(row.weight), theirs.get(row.merged)
        if value is not None and merged is not None and value.shape[1:] == merged.shape[1:]:
            program.set_weight(row.weight, merged[row.start : row.start + value.shape[0]])
