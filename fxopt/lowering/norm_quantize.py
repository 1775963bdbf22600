"""Norms that quantize what they make, for a linear that reads it.

    linear(norm(s))    becomes    y, q, scale, zero_point = norm_quantize(s)
                                  linear_w8a8(q, scale, zero_point)

Shapes: s [..., D]; where s is a sum that nothing else computes, the operator takes its parts.
    What others read of s and y is returned too. The codes are those of y, to the bit.
Source: Yao et al., ZeroQuant, NeurIPS 2022, arXiv:2206.01861 (quantization fused into norms).
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments

ops = torch.ops.fxopt
aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """What a normalization reads and how."""

    kind: str
    x: Any
    residual: Any
    weight: Any
    bias: Any
    eps: float

    @property
    def operands(self) -> tuple[Any, ...]:
        """The nodes it reads, or None where there is none."""
        return (self.x, self.residual, self.weight, self.bias)


def _norm_of(bindings: Mapping[str, Any]) -> Norm:
    """The matched normalization, of the matched sum where there is one."""
    node: Node = bindings["norm"]
    arguments = all_arguments(node)
    if node.target is ops.add_layer_norm.default:
        x, residual, weight, bias, eps = arguments
        return Norm("layer", x, residual, weight, bias, eps)
    if node.target is ops.fused_rms_norm.default:
        kind, (x, weight, eps), bias = "rms", arguments, None
    else:
        kind, (x, _, weight, bias, eps) = "layer", arguments[:5]
    if "total" in bindings:
        x, residual = bindings["total"].args[:2]
        return Norm(kind, x, residual, weight, bias, eps)
    return Norm(kind, x, None, weight, bias, eps)


class QuantizeInNorm(LoweringRule):
    """A linear reads the codes that the norm before it makes."""

    kernel = "norm_quantize"
    joins = True
    patience: ClassVar[float] = 1.0  # its values are those of its parts: only time can be gained

    def pattern(
        self,
        op: PatternOperators,
        x: Variable,
        gain: Variable,
        shift: Variable,
        eps: Variable,
        shape: Variable,
        weight: Variable,
        weight_scale: Variable,
        sums: Variable,
        bias: Variable,
        activation: Variable,
        pre_scale: Variable,
    ) -> Any:
        total = op.named("total", op.add(op.variable("left"), op.variable("right"), 1))
        added = op.call(ops.add_layer_norm, x, op.variable("residual"), gain, shift, eps)
        parts = (weight, weight_scale, sums, bias, activation, pre_scale)

        def norms(source: Any) -> list[Any]:
            rms = op.call(ops.fused_rms_norm, source, gain, eps)
            return [rms, op.layer_norm(source, shape, gain, shift, eps, ...)]

        found = [*norms(total), added, *norms(x)]
        return [op.call(ops.dynamic_linear_w8a8, op.named("norm", norm), *parts) for norm in found]

    def condition(self, program: Program, match: Match) -> bool:
        norm = _norm_of(match.bindings)
        if "total" in match.bindings:
            parts = (norm.x, norm.residual)
            like = (shape_of(match.total), dtype_of(match.total))
            if any(not isinstance(p, Node) or (shape_of(p), dtype_of(p)) != like for p in parts):
                return False
        # The operator takes the place of the first node that is read elsewhere.
        first = _first(match)
        return all(not isinstance(node, Node) or node < first for node in norm.operands)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.bindings.get("shape") or (0,)) != 1:
            return f"normalized over {len(match.shape)} axes"
        if shape_of(match.norm)[-1] == 0:
            return "there is nothing to normalize"
        return None

    def kept(self, match: Match) -> tuple[Node, ...]:
        return tuple(
            match.bindings[name]
            for name, reader in (("norm", match.root), ("total", match.bindings["norm"]))
            if name in match.bindings and set(match.bindings[name].users) != {reader}
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        kept, norm = self.kept(match), _norm_of(match.bindings)
        total = match.bindings.get("total")
        early = Builder(build.program, _first(match), build.made_by)
        made = early.call(
            ops.norm_quantize.default,
            *norm.operands,
            norm.eps,
            norm.kind,
            match.sums is not None,
            total in kept,
            match.norm in kept,
            match.pre_scale,
        )
        made.meta["module_path"] = match.norm.meta.get("module_path", "")
        codes = [early.call(operator.getitem, made, i) for i in (2, 3, 4)]
        for index, node in ((0, total), (1, match.norm)):
            if node in kept:
                _replace(node, early.call(operator.getitem, made, index), match)
        linear = (match.weight, match.weight_scale, match.sums, match.bias, match.activation)
        zero_point = None if match.sums is None else codes[2]
        dtype = dtype_of(match.root)
        return build.call(ops.linear_w8a8.default, *codes[:2], zero_point, *linear, dtype)


def _first(match: Match) -> Node:
    return match.bindings.get("total", match.bindings["norm"])


def _replace(node: Node, value: Node, match: Match) -> None:
    """Let other readers of a matched node read what the operator returns instead."""
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in match.interior)
