"""Store the rows of a weight that linears read apart as weights of their own.

    linear(x, W[a:b])   =   linear(x, W_ab),   W_ab = W[a:b] stored

So nn.MultiheadAttention projects queries and keys of different inputs: by slices of one packed
weight. A format has codes and scales for what is stored, hence for each part.
Shapes: W [out, in]; the parts are rows of W.
Exactness: equal.
"""

from collections.abc import Sequence

import torch
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.passes.quantization.sites import not_selected
from fxopt.rewrite.builder import Builder, free_name
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.sizes import fixed

aten = torch.ops.aten


def store_parts(
    program: Program, include: Sequence[str], exclude: Sequence[str], made_by: str
) -> None:
    """Give every part that only selected linears read a name; a weight is divided whole or not."""
    for weight in list(program.graph.find_nodes(op="get_attr")):
        parts = list(weight.users)
        if parts and all(_is_part(part, weight, include, exclude) for part in parts):
            for part in parts:
                _store(program, weight, part, made_by)


def _is_part(part: Node, weight: Node, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a node takes rows of a weight that linears alone read, all of them selected."""
    if part.target is not aten.slice.Tensor or part.args[0] is not weight:
        return False
    bounds = part.args[1:]
    if any(fixed(bound) is None for bound in bounds) or (*bounds, 0)[0] != 0:
        return False
    readers = list(part.users)
    return bool(readers) and all(
        reader.target is aten.linear.default
        and reader.args[1] is part
        and part not in (reader.args[0], *reader.args[2:])
        and not_selected(reader, include, exclude) is None
        for reader in readers
    )


def _store(program: Program, weight: Node, part: Node, made_by: str) -> None:
    name = str(weight.target)
    whole = program.weight(name)
    rows = aten.slice.Tensor(whole, *part.args[1:])
    first = (rows.storage_offset() - whole.storage_offset()) // max(1, whole.stride(0))
    stored = free_name(program, f"{name}_{first}_{first + len(rows)}")
    program.set_weight(stored, rows.clone())
    build = Builder(program, part, made_by)
    part.replace_all_uses_with(build.read(stored))
    erase_dead([part])
