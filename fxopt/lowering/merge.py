"""Linears that read the same activation become one: one quantization, one product."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, Site, module_path, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead

aten = torch.ops.aten
ops = torch.ops.fxopt


# Each kernel's first operand that belongs to the weight; what stands before it is the activation.
_MERGED: dict[Any, int] = {
    ops.dynamic_linear_w8a8.default: 1,
    ops.linear_w8a8.default: 3,
    ops.linear_w8a16.default: 1,
    ops.linear_w4a16.default: 1,
}


def merge_siblings(program: Program, original: Program) -> list[Site]:
    """Merge linears of one kernel that share their input and its scale.

    The rows of their weights are stored one after the other. The parts that `original`, the
    program before lowering, holds become views of them at once, so that nothing is held twice.
    """
    _share_codes(program)
    sites: list[Site] = []
    for target in _MERGED:
        groups: dict[Any, list[Node]] = defaultdict(list)
        for node in program.nodes(target):
            read, parts, rest = _operands(node)
            if rest[0] == "none" and _mergeable(parts):
                groups[read, tuple(_row_shape(part) for part in parts), rest].append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                sites += _merge(program, original, target, nodes)
    return sites


def _share_codes(program: Program) -> None:
    """Make linears that round one activation alike read the same codes."""
    known: dict[Any, Node] = {}
    for node in program.nodes(ops.quantize.default):
        key = tuple(tuple(arg) if isinstance(arg, list | tuple) else arg for arg in node.args)
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            erase_dead([node])


def _operands(node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """What a linear reads, the parts of its weight, and from its activation on what must agree."""
    first = _MERGED[node.target]
    activation = next(i for i, arg in enumerate(node.args) if isinstance(arg, str))
    return node.args[:first], node.args[first:activation], node.args[activation:]


def _row_shape(part: Any) -> tuple[Any, ...] | None:
    """What must agree for two parts to be stacked: all but the number of rows."""
    return None if part is None else shape_of(part)[1:]


def _mergeable(parts: Sequence[Any]) -> bool:
    # A weight that others read too (a tied one) must stay where it is.
    return all(
        part is None or (isinstance(part, Node) and part.op == "get_attr" and len(part.users) == 1)
        for part in parts
    )


def _merge(program: Program, original: Program, target: Any, nodes: list[Node]) -> list[Site]:
    first = nodes[0]
    build = Builder(program, first, "lower/merge_siblings")
    read, _, rest = _operands(first)
    columns = zip(*(_operands(node)[1] for node in nodes), strict=True)
    stacked = [_stack(build, original, list(parts)) for parts in columns]
    merged = build.call(target, *read, *stacked, *rest)
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


def _stack(build: Builder, original: Program, parts: list[Any]) -> Node | None:
    if parts[0] is None:
        return None
    names = [str(part.target) for part in parts]
    values = [build.program.weight(name) for name in names]
    merged = torch.cat(values)
    held = original.weights()
    for name, value, rows in zip(
        names, values, merged.split([len(v) for v in values]), strict=True
    ):
        build.program.set_weight(name, rows)
        if name in held and held[name].shape == value.shape:
            original.set_weight(name, rows)
    return build.weight(f"{names[0]}_merged", merged)
