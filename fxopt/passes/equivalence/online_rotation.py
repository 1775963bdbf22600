"""Rotations that no weight can take up on the writing side: an operator at run time.

    y = x W^T = (x H)(W H)^T,      q k^T = (q H)(k H)^T

Shapes: x [..., d]; W [n, d]; q and k [..., d]; H [d, d] orthogonal.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.transform import StateChange
from fxopt.ir.hadamard import hadamard_factors, supported_order
from fxopt.ir.program import Program, Site, module_path, shape_of
from fxopt.passes.equivalence.attended_keys import (
    READ_ELSEWHERE,
    attended_keys,
    replace_new_keys,
)
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.readers import Reader, read_elsewhere, readers
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.sizes import fixed

operators = torch.ops.fxopt


def block_order(width: int) -> int | None:
    """The largest order that divides a width and has a matrix, or None where that is one."""
    best = max((n for n in range(2, width + 1) if width % n == 0 and supported_order(n)), default=0)
    return best or None


def rotate_remaining(
    program: Program, changes: Changes, rotated: set[tuple[str, int]], made_by: str
) -> None:
    """R4: in front of every activation whose readers' columns no rotation has reached."""
    for reader in readers(program):
        if any((name, 1) in rotated for name in reader.weights):
            continue
        width = program.weight(reader.weights[0]).shape[1]
        order = block_order(width)
        reason = read_elsewhere(program, reader)
        if order is None:
            changes.refuse(reader.path, f"no Hadamard matrix fits its {width} channels")
        elif reason is not None:
            changes.refuse(reader.path, reason)
        else:
            _rotate_reader(program, changes, reader, order, made_by)


def _rotate_reader(
    program: Program, changes: Changes, reader: Reader, order: int, made_by: str
) -> None:
    for name in reader.weights:
        weight = program.weight(name)
        turned = operators.hadamard(weight.double(), order)
        program.set_weight(name, turned.to(weight.dtype))
    build = Builder(program, reader.linears[0], made_by)
    spun = build.call(operators.hadamard.default, reader.source, order)
    for linear in reader.linears:
        linear.update_arg(0, spun)
    factors = hadamard_factors(order)
    detail = f"R4, Hadamard of order {order} {factors} in front of {reader.path}"
    changes.sites.append(Site(module_path(reader.linears[0]), detail, reader.linears[0].name))


def rotate_keys(program: Program, changes: Changes, made_by: str) -> None:
    """R3: behind rotary embedding, so that the cache holds rotated keys."""
    for keys in attended_keys(program):
        first = keys.attentions[0]
        width = fixed(shape_of(keys.read)[-1])
        if width is None or not supported_order(width):
            changes.refuse(module_path(first), f"no Hadamard matrix of order {width}")
            continue
        if keys.new is None:
            changes.refuse(module_path(first), READ_ELSEWHERE)
            continue
        replace_new_keys(program, keys, made_by, operators.hadamard.default, width)
        if keys.past is not None:
            changes.follow(keys.past.name, _rotation(width))
        for node in keys.attentions:
            _spin(program, node, 0, node.args[0], width, made_by)
            detail = f"R3, Hadamard of order {width}"
            changes.sites.append(Site(module_path(node), detail, node.name))


def _spin(program: Program, reader: Node, index: int, value: Any, width: int, made_by: str) -> None:
    spun = Builder(program, reader, made_by).call(operators.hadamard.default, value, width)
    reader.update_arg(index, spun)


def _rotation(width: int) -> StateChange:
    def rotate(value: Tensor) -> Tensor:
        return operators.hadamard(value, width)

    return rotate
