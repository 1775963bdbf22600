"""Compute what does not depend on any input once, and write scalars as numbers.

    f(constant)       =   constant'
    x * tensor(2.0)   =   x * 2.0

Shapes: any fixed shape; results above a size are left to be computed.
Exactness: equal over the reals. A tensor is folded only if float32 and float64 agree on every
    bit of it, so that nothing is rounded; a number is computed in float64.

The model's own parameters and buffers are not folded: they keep their names and their place in
the model. What this file folds and stores itself lives under `constants.`.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from fxopt.ir.program import CONSTANTS, Program, dtype_of, shape_of
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.passes.canonicalize.functional import is_mutable
from fxopt.passes.canonicalize.results import is_result_copy
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.pattern import Match, PatternOperators, Variable
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import fixed

aten = torch.ops.aten
LARGEST = 2**20  # bytes of a folded result
GROWTH = 4  # how many times its inputs a folded result may be large, once it is past a page
PAGE = 4096
_UNINITIALIZED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def fold_constants(program: Program, made_by: str) -> int:
    """Replace every call on constants only by its result; returns how many were folded."""
    folded = 0
    for node in program.nodes():
        value = _fold(program, node)
        if value is None:
            continue
        build = Builder(program, node, f"{made_by}/constants")
        node.replace_all_uses_with(build.weight(_free_name(program, node), value))
        erase_dead([node])
        folded += 1
    return folded


def is_constant(value: Any) -> bool:
    """Whether a node is a tensor that folding may look into: not a parameter of the model."""
    if not isinstance(value, Node) or value.op == "placeholder":
        return False
    if value.op != "get_attr":
        return not value.all_input_nodes and _is_repeatable(value) and _bytes(value) is not None
    dtype = dtype_of(value)
    model_float = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
    return str(value.target).startswith(CONSTANTS) or not model_float


def _fold(program: Program, node: Node) -> Tensor | None:
    if not node.all_input_nodes or not _is_repeatable(node) or is_stored_weight(node):
        return None  # a call without inputs, such as arange, is a constant already
    if is_result_copy(node):
        return None  # the caller may write to it
    # Export reads a literal in the model's code through lift_fresh_copy: not a parameter.
    literal = (
        node.target is aten.lift_fresh_copy.default and node.all_input_nodes[0].op == "get_attr"
    )
    if not (literal or all(is_constant(source) for source in node.all_input_nodes)):
        return None
    size, known = _bytes(node), [_bytes(source) for source in node.all_input_nodes]
    inputs = sum(source or 0 for source in known)
    if size is None or size > LARGEST or size > max(PAGE, GROWTH * inputs):
        return None
    return evaluate(program, node)


def _bytes(node: Node) -> int | None:
    """The size of a tensor of fixed shape; None for anything else."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    sizes = [fixed(size) for size in shape_of(node)]
    known = [size for size in sizes if size is not None]
    return math.prod(known) * node.meta["val"].itemsize if len(known) == len(sizes) else None


def _is_repeatable(node: Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    uninitialized = name.removeprefix("aten::") in _UNINITIALIZED
    return name.startswith("aten::") and not (random or uninitialized or is_mutable(node))


def evaluate(program: Program, node: Node) -> Tensor | None:
    """The value of a call on constants, or None if computing it rounds."""
    value = _call(node, functools.partial(_plain, program))
    precise = _call(node, functools.partial(_double, program))
    exact = not value.is_floating_point() or torch.equal(value.double(), precise.double())
    return value.contiguous().clone() if exact else None


def _call(node: Node, read: Any) -> Any:
    args, kwargs = map_aggregate(node.args, read), map_aggregate(dict(node.kwargs), read)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _plain(program: Program, argument: Any) -> Any:
    if not isinstance(argument, Node):
        return argument
    if argument.op == "get_attr":
        return program.weight(str(argument.target))
    return _call(argument, functools.partial(_plain, program))


def _double(program: Program, argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    if isinstance(argument, Node) and argument.op != "get_attr":
        return _call(argument, functools.partial(_double, program))
    value = _plain(program, argument)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _free_name(program: Program, node: Node) -> str:
    taken, stem = program.weights(), f"{CONSTANTS}folded_{node.name}"
    names = itertools.chain([stem], (f"{stem}_{count}" for count in itertools.count(1)))
    return next(name for name in names if name not in taken)


def number_of(program: Program, node: Any) -> float | int | None:
    """The number that a zero-dimensional constant expression stands for, else None."""
    if not isinstance(node, Node) or shape_of(node) != () or dtype_of(node) == torch.bool:
        return None
    value = _scalar(program, node, depth=8)
    return None if value is None else value.item()


def _scalar(program: Program, node: Node, depth: int) -> Tensor | None:
    if node.op == "get_attr":
        if not is_constant(node) or shape_of(node) != ():
            return None
        value = program.weight(str(node.target))
        return value.double() if value.is_floating_point() else value
    if node.op != "call_function" or depth == 0 or not _is_repeatable(node):
        return None
    sources = {source: _scalar(program, source, depth - 1) for source in node.all_input_nodes}
    if any(value is None for value in sources.values()):
        return None

    def read(argument: Any) -> Any:
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return torch.float64
        return sources[argument] if isinstance(argument, Node) else argument

    result = _call(node, read)
    return result if isinstance(result, Tensor) and result.dim() == 0 else None


class WriteScalarAsNumber(Rule):
    """`x * tensor(2.0)` becomes `x * 2.0`; likewise for sums, quotients and choices."""

    def pattern(self, op: PatternOperators, x: Variable, scalar: Variable, mask: Variable) -> Any:
        return [
            op.add(x, scalar),
            op.mul(x, scalar),
            op.sub(x, scalar),
            op.div(x, scalar),
            op.where(mask, x, scalar),
            op.masked_fill(x, mask, scalar),
        ]

    def condition(self, program: Program, match: Match) -> bool:
        keeps_dtype = isinstance(match.x, Node) and dtype_of(match.x) == dtype_of(match.root)
        return keeps_dtype and number_of(program, match.scalar) is not None

    def rewrite(self, build: Builder, match: Match) -> Node:
        number = number_of(build.program, match.scalar)
        packet = match.root.target.overloadpacket  # type: ignore[union-attr]
        if packet is aten.where:
            return build.call(aten.where.ScalarOther, match.mask, match.x, number)
        if packet is aten.masked_fill:
            return build.call(aten.masked_fill.Scalar, match.x, match.mask, number)
        return build.call(packet.Tensor, match.x, number)


RULES = (WriteScalarAsNumber(),)
