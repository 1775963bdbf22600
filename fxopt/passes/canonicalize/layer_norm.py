"""Raise LayerNorm from its small operators to `aten.layer_norm`.

    (x - mean(x)) / sqrt(var(x) + eps) * w + b   =   layer_norm(x, [d], w, b, eps)

Shapes: x [..., d]; w, b [d].
Exactness: equal over the reals.
Source: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.canonicalize.rms_norm import (
    cast,
    check_norm,
    is_last_axis,
    is_read_without_gain,
    is_vector,
    passes_integers,
)
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import fixed, same_shape, same_size

aten = torch.ops.aten


class RaiseLayerNorm(Rule):
    """`(x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)` becomes `layer_norm(x, [d])`."""

    detail = "layer_norm"
    benefit = 1  # what it finds is also an RMSNorm, of the centred x

    def pattern(
        self, op: PatternOperators, x: Variable, axes: Variable, eps: Variable
    ) -> list[Any]:
        y = op.cast(x)
        centred = op.sub(y, op.mean(y, axes, True))
        square = op.either(op.pow(centred, 2), op.mul(centred, centred), op.square(centred))
        variance = op.either(
            op.mean(square, axes, True), op.named("variance", op.var(y, axes, ...))
        )
        stable = op.add(variance, eps)
        root = op.sqrt(stable)
        inverse = op.either(op.rsqrt(stable), op.pow(stable, -0.5), op.reciprocal(root))
        return [op.mul(centred, inverse), op.div(centred, root)]

    def condition(self, program: Program, match: Match) -> bool:
        last = is_last_axis(match.axes, match.x) and same_shape(match.root, match.x)
        known = last and not passes_integers(match)
        return known and ("variance" not in match.bindings or _is_biased(match.variance))

    def check(self, program: Program, match: Match) -> str | None:
        return check_norm(match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        x = cast(build, match.x, dtype_of(match.root))
        width = fixed(shape_of(x)[-1])
        return build.call(aten.layer_norm.default, x, [width], None, None, match.eps)


def _is_biased(variance: Node) -> bool:
    """Whether a variance divides by d, not by d - 1, and keeps its axis."""
    if not argument(variance, "keepdim"):
        return False
    if variance.target is aten.var.dim:
        return not argument(variance, "unbiased")
    return variance.target is aten.var.correction and argument(variance, "correction") == 0


class FoldLayerNormGain(Rule):
    """`layer_norm(x, [d]) * w` becomes `layer_norm(x, [d], w)`."""

    def pattern(self, op: PatternOperators, x: Variable, axes: Variable, eps: Variable) -> Any:
        norm = op.named("norm", op.layer_norm(x, axes, None, None, eps, ...))
        return op.mul(norm, op.variable("gain", is_vector))

    def condition(self, program: Program, match: Match) -> bool:
        return same_size(shape_of(match.gain)[0], shape_of(match.x)[-1])

    def check(self, program: Program, match: Match) -> str | None:
        return _check_fold(match, is_read_without_gain(match.norm))

    def rewrite(self, build: Builder, match: Match) -> Node:
        gain = cast(build, match.gain, dtype_of(match.norm))  # as the product widened it
        return build.call(aten.layer_norm.default, match.x, match.axes, gain, None, match.eps)


class FoldLayerNormBias(Rule):
    """`layer_norm(x, [d], w) + b` becomes `layer_norm(x, [d], w, b)`."""

    def pattern(self, op: PatternOperators, x: Variable, axes: Variable, eps: Variable) -> Any:
        norm = op.layer_norm(x, axes, op.variable("gain", is_vector), None, eps, ...)
        return op.add(op.named("norm", norm), op.variable("bias", is_vector))

    def condition(self, program: Program, match: Match) -> bool:
        return same_size(shape_of(match.bias)[0], shape_of(match.x)[-1])

    def check(self, program: Program, match: Match) -> str | None:
        return _check_fold(match, len(match.norm.users) > 1)

    def rewrite(self, build: Builder, match: Match) -> Node:
        bias = cast(build, match.bias, dtype_of(match.norm))
        return build.call(aten.layer_norm.default, match.x, match.axes, match.gain, bias, match.eps)


def _check_fold(match: Match, read_elsewhere: bool) -> str | None:
    if read_elsewhere:
        return "the normalized value is read without its gain or bias too"
    if dtype_of(match.root) != dtype_of(match.norm):
        return "the gain or bias has a wider dtype than the normalized value"
    return None


RULES = (RaiseLayerNorm(), FoldLayerNormGain(), FoldLayerNormBias())
