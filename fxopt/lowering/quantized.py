"""Rules that turn quantize/dequantize around an operator into one integer kernel."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.lowering.rule import WEIGHT_ONLY, LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable

aten = torch.ops.aten
ops = torch.ops.fxopt
INT8 = torch.int8
_ROWS_AT_ONCE = 64


def _weight_pattern(op: PatternOperators) -> Any:
    return op.call(
        ops.dequantize,
        op.variable("weight", is_weight),
        op.variable("weight_scale", is_weight),
        None,
        op.variable("weight_block"),
        ...,
    )


def is_weight(value: Any) -> bool:
    """Whether a pattern's value is a stored tensor."""
    return isinstance(value, Node) and value.op == "get_attr"


def scale_per_row(program: Program, match: Match) -> str | None:
    """Why the weight's scales do not fit a kernel that has one per output, or None."""
    columns = shape_of(match.weight)[1]
    if match.weight_block[1] not in (-1, columns):
        return f"scales per block {list(match.weight_block)}: the kernel takes one per output"
    if program.weight(str(match.weight.target)).dtype != INT8:
        return "the weight is not int8"
    return None


def row_scale(build: Builder, match: Match) -> Node:
    """The weight's scales as one float32 per output, stored; rows of a group repeat theirs."""
    name = str(match.weight_scale.target)
    rows = shape_of(match.weight)[0]
    scale = build.program.weight(name)
    if tuple(scale.shape) == (rows,):
        return match.weight_scale
    groups = scale.reshape(-1)
    spread = groups.repeat_interleave(rows // max(1, len(groups)))
    return build.weight(f"{name}_rows", spread.float())


class _QuantizedLinear(LoweringRule):
    def _weight_sums(self, build: Builder, match: Match) -> Node:
        name = str(match.weight.target)
        # Some rows at a time: a sum first converts all it is given, to four times the bytes.
        rows = build.program.weight(name).split(_ROWS_AT_ONCE)
        sums = torch.cat([part.sum(1, dtype=torch.int32) for part in rows])
        return build.weight(f"{name}_row_sums", sums)


class DynamicLinear(_QuantizedLinear):
    """Per-token quantization, integer product and epilogue in one kernel."""

    kernel = "dynamic_linear_w8a8"
    benefit = 3

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        block: Variable,
        symmetric: Variable,
        low: Variable,
        bias: Variable,
    ) -> Any:
        qparams = op.call(ops.choose_qparams, x, block, symmetric, low, 127)
        scale = op.call(operator.getitem, qparams, 0)
        found: list[Any] = []
        for zero_point in (None, op.call(operator.getitem, qparams, 1)):
            q = op.call(ops.quantize, x, scale, zero_point, block, INT8, low, 127)
            back = op.call(ops.dequantize, q, scale, zero_point, block, ...)
            found.append(op.linear(back, _weight_pattern(op), bias))
        return found

    def check(self, program: Program, match: Match) -> str | None:
        if list(match.block) != [1] * (len(match.block) - 1) + [-1]:
            return "the activation is not quantized per token"
        if (match.symmetric, match.low) not in ((True, -127), (False, -128)):
            return f"activations in [{match.low}, 127]"
        return scale_per_row(program, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.dynamic_linear_w8a8.default,
            match.x,
            match.weight,
            row_scale(build, match),
            None if match.symmetric else self._weight_sums(build, match),
            match.bias,
            "none",
        )


class StaticLinear(_QuantizedLinear):
    """An activation quantized with known scales: integer product and epilogue in one kernel."""

    kernel = "linear_w8a8"
    benefit = 2

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        scale: Variable,
        zero_point: Variable,
        block: Variable,
        bias: Variable,
    ) -> Any:
        q = op.named("q", op.call(ops.quantize, x, scale, zero_point, block, INT8, ...))
        back = op.call(ops.dequantize, q, scale, zero_point, block, ...)
        return op.linear(back, _weight_pattern(op), bias)

    def check(self, program: Program, match: Match) -> str | None:
        per_tensor = all(size == -1 for size in match.block)
        per_token = list(match.block) == [1] * (len(match.block) - 1) + [-1]
        if not (per_tensor or per_token):
            return f"activation scales per block {list(match.block)}"
        return scale_per_row(program, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        sums = None if match.zero_point is None else self._weight_sums(build, match)
        return build.call(
            ops.linear_w8a8.default,
            match.q,
            match.scale,
            match.zero_point,
            match.weight,
            row_scale(build, match),
            sums,
            match.bias,
            "none",
            dtype_of(match.root),
        )


class WeightOnlyLinear(LoweringRule):
    """Floating activations times int8 weights."""

    kernel = "linear_w8a16"
    patience = WEIGHT_ONLY

    def pattern(self, op: PatternOperators, x: Variable, bias: Variable) -> Any:
        return op.linear(x, _weight_pattern(op), bias)

    def check(self, program: Program, match: Match) -> str | None:
        if match.x.target is ops.dequantize.default:
            return "the activation is quantized too"
        return scale_per_row(program, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        scale = row_scale(build, match)
        return build.call(
            ops.linear_w8a16.default, match.x, match.weight, scale, match.bias, "none"
        )


class Int8Embedding(LoweringRule):
    """Rows of an int8 table, dequantized after the lookup."""

    kernel = "embedding_int8"
    patience = math.inf  # microseconds for each call, against a table of the vocabulary

    def pattern(self, op: PatternOperators, index: Variable) -> Any:
        return op.embedding(_weight_pattern(op), index, ...)

    def check(self, program: Program, match: Match) -> str | None:
        return scale_per_row(program, match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        scale = row_scale(build, match)
        return build.call(
            ops.embedding_int8.default, match.weight, scale, match.index, dtype_of(match.root)
        )


class _FuseActivation(LoweringRule):
    """An activation that only this linear feeds becomes its epilogue."""

    kernel = "epilogue"

    def _linear(self, op: PatternOperators) -> Any:
        kernels = (ops.dynamic_linear_w8a8, ops.linear_w8a8, ops.linear_w8a16, ops.linear_w4a16)
        return op.either(*(op.named("linear", op.call(kernel, ...)) for kernel in kernels))

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.linear.users) != 1 and not self._same_users(match):
            return "the linear's output is read elsewhere too"
        if "none" not in match.linear.args:
            return "the linear has an epilogue already"
        return None

    def _same_users(self, match: Match) -> bool:
        return all(user is match.root for user in match.linear.users)

    def _with(self, build: Builder, match: Match, activation: str) -> Node:
        args = [activation if arg == "none" else arg for arg in match.linear.args]
        return build.call(match.linear.target, *args)


class FuseGelu(_FuseActivation):
    """`gelu(linear)` in one kernel."""

    def pattern(self, op: PatternOperators) -> Any:
        return op.gelu(self._linear(op), ...)

    def rewrite(self, build: Builder, match: Match) -> Node:
        tanh = match.root.kwargs.get("approximate", "none") == "tanh" or "tanh" in match.root.args
        return self._with(build, match, "gelu_tanh" if tanh else "gelu")


class FuseRelu(_FuseActivation):
    """`relu(linear)` in one kernel."""

    def pattern(self, op: PatternOperators) -> Any:
        return op.relu(self._linear(op))

    def rewrite(self, build: Builder, match: Match) -> Node:
        return self._with(build, match, "relu")


class FuseSilu(_FuseActivation):
    """`silu(linear)` in one kernel; a gate's is taken with the product it gates."""

    def pattern(self, op: PatternOperators) -> Any:
        return op.silu(self._linear(op))

    def condition(self, program: Program, match: Match) -> bool:
        return not any(user.target is aten.mul.Tensor for user in match.root.users)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return self._with(build, match, "silu")
