"""Mixtures of experts whose weights are stored as codes, and the kernels that read them."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, shape_of
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.lowering.four_bit import (
    ReadCodes,
    four_bit_codes,
    large_table,
    read_codes,
    scale_and_zero_point,
    value_table,
)
from fxopt.lowering.rule import WEIGHT_ONLY, LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

ops = torch.ops.fxopt


class _Experts(LoweringRule):
    """A kernel reads the weights of the chosen experts; otherwise all are held floating."""

    patience = WEIGHT_ONLY

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        index: Variable,
        mixing: Variable,
        gate_up_bias: Variable,
        down_bias: Variable,
        activation: Variable,
        gated: Variable,
    ) -> Any:
        weights = (op.variable(name, is_stored_weight) for name in ("gate_up", "down"))
        rest = (gate_up_bias, down_bias, activation, gated)
        return op.call(ops.moe, x, index, mixing, *weights, *rest)

    def routings(self, match: Match) -> Mapping[Node, int]:
        return {match.index: int(shape_of(match.down)[0])}

    def _call(self, build: Builder, match: Match, operator: Any, parts: list[Any]) -> Node:
        routed = (match.x, match.index, match.mixing)
        rest = (match.gate_up_bias, match.down_bias, match.activation, match.gated)
        return build.call(operator, *routed, *parts, *rest)


class Int8Experts(_Experts):
    """Experts of int8 weights, one scale per output."""

    kernel = "moe_w8a16"

    def condition(self, program: Program, match: Match) -> bool:
        return not any(read_codes(weight) for weight in _weights(match))

    def check(self, program: Program, match: Match) -> str | None:
        reasons = (_not_per_output(program, weight) for weight in _weights(match))
        return next((reason for reason in reasons if reason is not None), None)

    def rewrite(self, build: Builder, match: Match) -> Node:
        parts: list[Any] = []
        for weight in _weights(match):
            codes, scale = weight.args[:2]
            parts += [codes, _scale_per_output(build, scale, shape_of(codes)[-2])]
        return self._call(build, match, ops.moe_w8a16.default, parts)


class FourBitExperts(_Experts):
    """Experts of codes of at most four bits."""

    kernel = "moe_w4a16"

    def condition(self, program: Program, match: Match) -> bool:
        return all(read_codes(weight) is not None for weight in _weights(match))

    def check(self, program: Program, match: Match) -> str | None:
        reasons = (large_table(program, read_codes(weight)) for weight in _weights(match))
        return next((reason for reason in reasons if reason is not None), None)

    def rewrite(self, build: Builder, match: Match) -> Node:
        parts: list[Any] = []
        for weight in _weights(match):
            read = read_codes(weight)
            assert isinstance(read, ReadCodes)  # noqa: S101 - `condition` looked
            codes = four_bit_codes(build, read)
            parts += [codes, *scale_and_zero_point(build, read), value_table(build, read)]
        return self._call(build, match, ops.moe_w4a16.default, parts)


def _weights(match: Match) -> tuple[Any, Any]:
    return match.gate_up, match.down


def _not_per_output(program: Program, weight: Node) -> str | None:
    codes: Any = weight.args[0]
    if weight.target is not ops.dequantize.default or codes.op != "get_attr":
        return "one of its weights is in four bits and the other is not"
    if program.weight(str(codes.target)).dtype != torch.int8:
        return "the weight is not int8"
    if weight.args[2] is not None:
        return "the weight has zero points"
    columns, block = shape_of(weight)[-1], weight.args[3]
    if block[-1] not in (-1, columns):  # type: ignore[index]
        return f"scales per block {list(block)}: the kernel takes one per output"  # type: ignore[arg-type]
    return None


def _scale_per_output(build: Builder, scale: Any, rows: int) -> Node:
    """Scales [E, blocks, 1] as one float32 for each output, [E, rows]."""
    name = str(scale.target)
    value = build.program.weight(name).flatten(1)
    spread = value.repeat_interleave(rows // value.shape[1], 1)
    return build.weight(f"{name}_rows", spread.float())
