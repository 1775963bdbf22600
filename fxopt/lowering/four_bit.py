"""Weights of at most four bits, uniform or from a table, and the kernel that reads their codes."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.operators import block_counts
from fxopt.ir.program import CONSTANTS, Program, shape_of
from fxopt.ir.stored_codes import is_stored_weight, stored_values
from fxopt.lowering.rule import WEIGHT_ONLY, LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

aten = torch.ops.aten
ops = torch.ops.fxopt
_BITS, _CODES = 4, 16


class FourBitLinear(LoweringRule):
    """Floating activations times codes of at most four bits."""

    kernel = "linear_w4a16"
    patience = WEIGHT_ONLY

    def pattern(self, op: PatternOperators, x: Variable, bias: Variable) -> Any:
        return op.linear(x, op.variable("weight", is_stored_weight), bias)

    def condition(self, program: Program, match: Match) -> bool:
        return read_codes(match.weight) is not None

    def check(self, program: Program, match: Match) -> str | None:
        if match.x.target is ops.dequantize.default:
            return "the activation is quantized too"
        return large_table(program, read_codes(match.weight))

    def rewrite(self, build: Builder, match: Match) -> Node:
        read = read_codes(match.weight)
        assert read is not None  # noqa: S101 - `condition` looked
        scale, zero = scale_and_zero_point(build, read)
        return build.call(
            ops.linear_w4a16.default,
            match.x,
            four_bit_codes(build, read),
            scale,
            zero,
            match.bias,
            "none",
            value_table(build, read),
            *self._outliers(build, read),
        )

    def _outliers(self, build: Builder, read: "ReadCodes") -> list[Node | None]:
        """Outliers by row, as what they add to the value of their code."""
        if read.positions is None or read.outliers is None:
            return [None, None, None]
        program = build.program
        plain = stored_values(program, read.plain).float()
        positions, order = program.weight(str(read.positions.target)).sort()
        values = program.weight(str(read.outliers.target))[order].float()
        rows, columns = positions // plain.shape[1], positions % plain.shape[1]
        start = torch.searchsorted(rows, torch.arange(plain.shape[0] + 1)).int()
        name = str(read.codes.target)
        parts: dict[str, Tensor] = {
            "start": start,
            "column": columns.int(),
            "value": values - plain.flatten()[positions],
        }
        return [build.weight(f"{name}_outlier_{key}", part) for key, part in parts.items()]


@dataclass(frozen=True)
class ReadCodes:
    """What a weight of few bits is read from."""

    plain: Node  # its values without outliers
    codes: Node
    bits: int
    length: int
    table: Node | None
    scale: Node | None
    zero: Node | None
    groups: int
    positions: Node | None
    outliers: Node | None


def read_codes(weight: Node) -> ReadCodes | None:
    """The parts of a weight of at most four bits, or None where it is another kind."""
    node: Any = weight
    positions = outliers = scale = zero = table = None
    if node.target is aten.put.default:
        node, positions, outliers = node.args[:3]
    plain, groups = node, 1
    if node.target is ops.dequantize.default:
        inner, scale, zero, block = node.args[:4]
        groups = block_counts(shape_of(node), block)[-1]
        node = inner
    if node.target is ops.lookup.default:
        node, table, block = node.args
        if any(size != -1 for size in block):
            return None
    if node.target is not ops.unpack.default or node.args[1] > _BITS:
        return None
    codes, bits, length = node.args[:3]
    return ReadCodes(plain, codes, bits, length, table, scale, zero, groups, positions, outliers)


def large_table(program: Program, read: ReadCodes | None) -> str | None:
    """Why the table of a weight does not fit the kernel, or None."""
    if read is None or read.table is None:
        return None
    entries = program.weight(str(read.table.target))
    if entries.numel() <= _CODES:
        return None
    return f"a table {list(entries.shape)}; the kernel takes {_CODES} values"


def four_bit_codes(build: Builder, read: ReadCodes) -> Node:
    """The codes in four bits; fewer are widened, so that two always share a byte."""
    if read.bits == _BITS:
        return read.codes
    name = str(read.codes.target)
    codes = ops.unpack(build.program.weight(name), read.bits, read.length, False)
    return build.weight(f"{name}_nibbles", ops.pack(codes, _BITS))


def scale_and_zero_point(build: Builder, read: ReadCodes) -> tuple[Node, Node | None]:
    """Both as [..., rows, groups]; without scales ones."""
    shape = (*shape_of(read.codes)[:-1], read.groups)
    scale, zero = (_per_row(build, part, shape) for part in (read.scale, read.zero))
    if scale is None:
        ones = torch.ones(*shape[:-1], 1)
        scale = build.weight(f"{read.codes.target}_ones", ones)
    return scale, zero


def _per_row(build: Builder, parameter: Node | None, shape: tuple[int, ...]) -> Node | None:
    """A parameter of blocks as one of [..., rows, groups]."""
    if parameter is None:
        return None
    name = str(parameter.target)
    value = build.program.weight(name)
    if tuple(value.shape) == shape:
        return parameter
    spread = value.repeat_interleave(shape[-2] // value.shape[-2], -2)
    return build.weight(f"{name}_rows", spread.contiguous())


def value_table(build: Builder, read: ReadCodes) -> Node:
    """The value of each code; sites share a table of integers, so that siblings can be merged."""
    if read.table is None:
        codes = torch.arange(1 << read.bits)
        values = torch.where(codes < len(codes) // 2, codes, codes - len(codes))
        name = f"{CONSTANTS}int{read.bits}_values"
    else:
        name = str(read.table.target)
        values = build.program.weight(name).flatten()
        name = f"{name}_values"
    padded = torch.nn.functional.pad(values.float(), (0, _CODES - len(values)))
    known = build.program.weights()
    return build.read(name) if name in known else build.weight(name, padded)
