"""A whole feed-forward block as one kernel, where its parts have become int8 kernels."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, shape_of
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

ops = torch.ops.fxopt


class GatedMlp(LoweringRule):
    """`down(act(gate(x)) * up(x))`: what lies between never leaves the kernel."""

    kernel = "dynamic_gated_mlp_w8a8"

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        weight: Variable,
        scale: Variable,
        sums: Variable,
        bias: Variable,
        down: Variable,
        down_scale: Variable,
        down_sums: Variable,
        down_bias: Variable,
        pre_scale: Variable,
        down_pre_scale: Variable,
    ) -> Any:
        linear = ops.dynamic_linear_w8a8
        both = op.named("both", op.call(linear, x, weight, scale, sums, bias, "none", pre_scale))
        gate = op.slice(both, op.variable("axis"), 0, op.variable("middle"))
        up = op.slice(both, op.variable("axis"), op.variable("middle"), op.variable("end"))
        inner = op.named(
            "inner", op.call(ops.gated_activation, gate, up, op.variable("activation"))
        )
        parts = (down, down_scale, down_sums, down_bias)
        return op.call(linear, inner, *parts, "none", down_pre_scale)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.both.users) != 2 or len(match.inner.users) != 1:
            return "the gate or the product is read elsewhere too"
        if match.end != 2 * match.middle or shape_of(match.both)[-1] != match.end:
            return "other linears were merged with the gate"
        if (match.sums is None) != (match.down_sums is None):
            return "one product is symmetric and the other is not"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.dynamic_gated_mlp_w8a8.default,
            match.x,
            match.weight,
            match.scale,
            match.sums,
            match.bias,
            match.down,
            match.down_scale,
            match.down_sums,
            match.down_bias,
            match.activation,
            match.pre_scale,
            match.down_pre_scale,
        )


class Mlp(LoweringRule):
    """`down(act(up(x)))`: the activation is quantized where it is made, in one kernel."""

    kernel = "dynamic_mlp_w8a8"
    joins = True

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        weight: Variable,
        scale: Variable,
        sums: Variable,
        bias: Variable,
        activation: Variable,
        pre_scale: Variable,
    ) -> Any:
        linear = ops.dynamic_linear_w8a8
        parts = (weight, scale, sums, bias)
        inner = op.named("inner", op.call(linear, x, *parts, activation, pre_scale))
        down = (op.variable(f"down_{part}") for part in ("weight", "scale", "sums", "bias"))
        return op.call(linear, inner, *down, "none", op.variable("down_pre_scale"))

    def condition(self, program: Program, match: Match) -> bool:
        # Two linears with nothing between are no feed-forward block.
        return match.activation != "none"

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.inner.users) != 1:
            return "the activation is read elsewhere too"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.dynamic_mlp_w8a8.default,
            match.x,
            match.weight,
            match.scale,
            match.sums,
            match.bias,
            match.down_weight,
            match.down_scale,
            match.down_sums,
            match.down_bias,
            match.activation,
            match.pre_scale,
            match.down_pre_scale,
        )
