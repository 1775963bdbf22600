"""Rules for the operators between linears: norms, rotary embedding, gates."""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments, argument

aten = torch.ops.aten
ops = torch.ops.fxopt


class FusedRmsNorm(LoweringRule):
    """`aten.rms_norm` over the last axis in one pass over memory."""

    kernel = "fused_rms_norm"

    def pattern(
        self, op: PatternOperators, x: Variable, shape: Variable, weight: Variable, eps: Variable
    ) -> Any:
        return op.rms_norm(x, shape, weight, eps)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.shape) != 1:
            return f"normalized over {len(match.shape)} axes"
        if match.eps is None:
            return "eps depends on the dtype"
        if match.weight is not None and dtype_of(match.weight) != dtype_of(match.x):
            return f"the gain is {dtype_of(match.weight)}, the input {dtype_of(match.x)}"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(ops.fused_rms_norm.default, match.x, match.weight, match.eps)


class AddLayerNorm(LoweringRule):
    """`layer_norm(x + residual)` in one pass, where nothing else reads the sum."""

    kernel = "add_layer_norm"

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        residual: Variable,
        shape: Variable,
        weight: Variable,
        bias: Variable,
        eps: Variable,
    ) -> Any:
        total = op.named("total", op.add(x, residual, 1))
        return op.layer_norm(total, shape, weight, bias, eps, ...)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.total.users) != 1:
            return "the sum is read elsewhere too"
        if len(match.shape) != 1 or match.weight is None or match.bias is None:
            return "the norm has no gain or bias, or more than one axis"
        parts = (match.x, match.residual)
        if any(shape_of(part) != shape_of(match.total) for part in parts):
            return "the sum broadcasts"
        dtypes = {dtype_of(part) for part in (*parts, match.weight, match.bias)}
        return None if len(dtypes) == 1 else "the dtypes differ"

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.add_layer_norm.default,
            match.x,
            match.residual,
            match.weight,
            match.bias,
            match.eps,
        )


class ApplyRope(LoweringRule):
    """`fxopt::rope` without the halves and products in memory."""

    kernel = "apply_rope"

    def pattern(
        self, op: PatternOperators, x: Variable, cos: Variable, sin: Variable, pairs: Variable
    ) -> Any:
        return op.call(ops.rope, x, cos, sin, pairs)

    def check(self, program: Program, match: Match) -> str | None:
        if dtype_of(match.x) != dtype_of(match.cos):
            return f"the tables are {dtype_of(match.cos)}, the input {dtype_of(match.x)}"
        if len(shape_of(match.x)) != 4 or len(shape_of(match.cos)) != 4:
            return "the input or the tables are not [B, H, S, D]"
        if shape_of(match.cos)[1] != 1:
            return "the tables differ between heads"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(ops.apply_rope.default, match.x, match.cos, match.sin, match.pairs)


class _GatedActivation(LoweringRule):
    kernel = "gated_activation"
    name_in_kernel = ""

    def check(self, program: Program, match: Match) -> str | None:
        if shape_of(match.gate) != shape_of(match.up) or dtype_of(match.gate) != dtype_of(match.up):
            return "gate and up differ in shape or dtype"
        if len(match.active.users) != 1:
            return "the gate is read elsewhere too"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(
            ops.gated_activation.default, match.gate, match.up, self._activation(match)
        )

    def _activation(self, match: Match) -> str:
        return self.name_in_kernel


class SiluGate(_GatedActivation):
    """`silu(gate) * up` in one pass."""

    name_in_kernel = "silu"

    def pattern(self, op: PatternOperators, gate: Variable, up: Variable) -> Any:
        return op.mul(op.named("active", op.silu(gate)), up)


class GeluGate(_GatedActivation):
    """`gelu(gate) * up` in one pass."""

    def pattern(self, op: PatternOperators, gate: Variable, up: Variable) -> Any:
        return op.mul(op.named("active", op.gelu(gate, ...)), up)

    def _activation(self, match: Match) -> str:
        tanh = argument(match.active, "approximate") == "tanh"
        return "gelu_tanh" if tanh else "gelu"


class FusedAttention(LoweringRule):
    """`fxopt::attention` without a mask in memory, grouped heads read once."""

    kernel = "fused_attention"

    def pattern(self, op: PatternOperators) -> Any:
        return op.call(ops.attention, ...)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(ops.fused_attention.default, *all_arguments(match.root))
