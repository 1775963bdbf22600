"""Rules by which a scale per input channel rides inside the operator that quantizes.

    quantize(x * pre_scale)    becomes    quantize(x, pre_scale)

Shapes: x [..., K]; pre_scale [K], stored. Where all that read the product take its scale, the
    product is no longer computed, and with it goes a pass over memory.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.lowering.quantized import is_weight
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

ops = torch.ops.fxopt


def _scaled(op: PatternOperators, x: Variable) -> Any:
    return op.named("product", op.mul(x, op.variable("pre_scale", is_weight)))


def _is_stored(value: Any) -> bool:
    return value is None or is_weight(value)


class _PreScale(LoweringRule):
    def condition(self, program: Program, match: Match) -> bool:
        channels = shape_of(match.x)[-1:]
        return list(shape_of(match.pre_scale)) == list(channels) and dtype_of(match.x) == dtype_of(
            match.product
        )


class DynamicPreScale(_PreScale):
    """A scale in front of a linear that quantizes per token is applied where it quantizes."""

    kernel = "dynamic_linear_w8a8"

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        weight: Variable,
        weight_scale: Variable,
        weight_sum: Variable,
        bias: Variable,
        activation: Variable,
    ) -> Any:
        parts = (weight, weight_scale, weight_sum, bias, activation)
        return op.call(ops.dynamic_linear_w8a8, _scaled(op, x), *parts, None)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.dynamic_linear_w8a8.default,
            match.x,
            match.weight,
            match.weight_scale,
            match.weight_sum,
            match.bias,
            match.activation,
            match.pre_scale,
        )


class StaticPreScale(_PreScale):
    """A scale in front of a static quantization divides the step: x c / s = x / (s / c).

    s / c is rounded once, so a number that lies on the edge between two integers may become the
    other one.
    """

    kernel = "linear_w8a8"

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        block: Variable,
        dtype: Variable,
        low: Variable,
        high: Variable,
    ) -> Any:
        step, zero_point = op.variable("step", is_weight), op.variable("zero_point", _is_stored)
        return op.call(ops.quantize, _scaled(op, x), step, zero_point, block, dtype, low, high)

    def condition(self, program: Program, match: Match) -> bool:
        # What dequantizes must know the step, and is matched together with its `quantize` by it.
        known = any(user.target is ops.dequantize.default for user in match.root.users)
        per_tensor = all(size == -1 for size in match.block)
        return not known and per_tensor and super().condition(program, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        block = [*match.block[:-1], 1]
        name = str(match.pre_scale.target)
        pre_scale = build.program.weight(name)
        step = build.program.weight(str(match.step.target))
        zero_point = build.program.constant(match.zero_point)
        steps = step / pre_scale.to(step.dtype)
        if zero_point is not None:
            zero_point = zero_point.expand(steps.shape).contiguous()
        return build.call(
            ops.quantize.default,
            match.x,
            build.weight(f"{name}_step", steps),
            None if zero_point is None else build.weight(f"{name}_zero_point", zero_point),
            block,
            match.dtype,
            match.low,
            match.high,
        )
