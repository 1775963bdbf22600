"""Raise RMSNorm from its small operators to `aten.rms_norm`.

    x / sqrt(mean(x^2, -1) + eps) * w   =   rms_norm(x, [d], w, eps)

Shapes: x [..., d]; w [d].
Exactness: equal over the reals. A norm that a half-precision model computes in float32 becomes
    the norm of the half-precision tensor, which ATen computes in float32 inside; its result is
    rounded once, where the model may round before and after the gain.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv:1910.07467.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.canonicalize.cleanup import holds_every_value, is_transparent_cast
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument, packet_of
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import fixed, same_shape, same_size

aten = torch.ops.aten


class RaiseRmsNorm(Rule):
    """`x * rsqrt(mean(x^2) + eps)` becomes `rms_norm(x, [d], None, eps)`."""

    detail = "rms_norm"

    def pattern(
        self, op: PatternOperators, x: Variable, axes: Variable, eps: Variable
    ) -> list[Any]:
        y = op.cast(x)
        square = op.either(op.pow(y, 2), op.mul(y, y), op.square(y))
        stable = op.add(op.mean(square, axes, True), eps)
        root = op.sqrt(stable)
        inverse = op.either(op.rsqrt(stable), op.pow(stable, -0.5), op.reciprocal(root))
        return [op.mul(op.cast(x), inverse), op.div(op.cast(x), root)]

    def condition(self, program: Program, match: Match) -> bool:
        last = is_last_axis(match.axes, match.x) and same_shape(match.root, match.x)
        return last and not passes_integers(match)

    def check(self, program: Program, match: Match) -> str | None:
        return check_norm(match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        x = cast(build, match.x, dtype_of(match.root))
        width = fixed(shape_of(x)[-1])
        return build.call(aten.rms_norm.default, x, [width], None, match.eps)


class FoldRmsNormGain(Rule):
    """`rms_norm(x, [d], None, eps) * w` becomes `rms_norm(x, [d], w, eps)`."""

    def pattern(self, op: PatternOperators, x: Variable, axes: Variable, eps: Variable) -> Any:
        norm = op.named("norm", op.rms_norm(x, axes, None, eps))
        return op.mul(norm, op.variable("gain", is_vector))

    def condition(self, program: Program, match: Match) -> bool:
        return same_size(shape_of(match.gain)[0], shape_of(match.x)[-1])

    def check(self, program: Program, match: Match) -> str | None:
        if is_read_without_gain(match.norm):
            return "the normalized value is read without its gain too"
        if dtype_of(match.root) != dtype_of(match.norm):
            return "the gain has a wider dtype than the normalized value"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.rms_norm.default, match.x, match.axes, match.gain, match.eps)


class NormalizeInInputDtype(Rule):
    """`to(rms_norm(to(x, wider)), dtype)` becomes `rms_norm(x)`: ATen widens x by itself."""

    def pattern(self, op: PatternOperators, x: Variable, axes: Variable) -> list[Any]:
        wide = op.to(x, ...)
        gain, bias, eps = op.variable("gain"), op.variable("bias"), op.variable("eps")
        return [
            op.to(op.named("norm", op.rms_norm(wide, axes, gain, eps)), ...),
            op.to(op.named("norm", op.layer_norm(wide, axes, gain, bias, eps, ...)), ...),
        ]

    def condition(self, program: Program, match: Match) -> bool:
        narrow = dtype_of(match.x)
        brackets = dtype_of(match.root) == narrow != dtype_of(match.norm)
        return brackets and holds_every_value(dtype_of(match.norm), narrow)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.norm.users) > 1:
            return "the norm is also read in the dtype it was computed in"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        _, *rest = (_unwidened(argument, match.x) for argument in match.norm.args)
        return build.call(match.norm.target, match.x, *rest)


def _unwidened(gain: Any, x: Node) -> Any:
    """A gain or bias as it was before it was widened from the dtype of x; others as they are."""
    widened = isinstance(gain, Node) and gain.target is aten.to.dtype
    return gain.args[0] if widened and dtype_of(gain.args[0]) == dtype_of(x) else gain


def is_last_axis(axes: Any, x: Node) -> bool:
    """Whether `axes` names the last axis of x and no other."""
    rank = len(shape_of(x))
    return isinstance(axes, list | tuple) and [axis % rank for axis in axes] == [rank - 1]


def passes_integers(match: Match) -> bool:
    """Whether a conversion that a pattern looks through rounds to integers."""
    casts = (node for node in match.interior if packet_of(node) is aten.to)
    return not all(is_transparent_cast(node) for node in casts)


def is_vector(value: Any) -> bool:
    """Whether a node is one vector, as a gain or a bias is."""
    return isinstance(value, Node) and len(shape_of(value)) == 1


def is_read_without_gain(norm: Node) -> bool:
    """Whether anything but a product with a gain reads a norm.

    Blocks side by side may normalize one x with gains of their own; each becomes a norm.
    """
    return not all(_is_gain(user, norm) for user in norm.users)


def _is_gain(product: Node, norm: Node) -> bool:
    factors = product.args if product.target is aten.mul.Tensor else ()
    return any(
        is_vector(factor) and same_size(shape_of(factor)[0], shape_of(norm)[-1])
        for factor in factors
    )


def check_norm(match: Match) -> str | None:
    """Why a norm cannot be raised, or None: eps and the width must be known."""
    if not isinstance(match.eps, float | int):
        return "the epsilon of the norm is computed, not a number"
    if fixed(shape_of(match.x)[-1]) is None:
        return "the normalized axis has no fixed size"
    return None


def cast(build: Builder, x: Node, dtype: torch.dtype | None) -> Node:
    """The node itself if it has the dtype, else its conversion."""
    return x if dtype_of(x) == dtype else build.call(aten.to.dtype, x, dtype)


def norm_gain(node: Node) -> tuple[Node | None, float]:
    """The stored gain of a norm and the offset that is added to it.

    `(1 + w)` norms read `aten.add(w, 1.0)`; the pair is then (w, 1.0). The node is None when the
    norm has no gain or one that is not stored.
    """
    gain, offset = argument(node, "weight"), 0.0
    while isinstance(gain, Node) and gain.op == "call_function":
        if gain.target is aten.add.Tensor and isinstance(gain.args[1], int | float):
            offset += float(gain.args[1])
        elif gain.target is not aten.to.dtype:
            return None, 0.0
        gain = gain.all_input_nodes[0]
    stored = isinstance(gain, Node) and gain.op == "get_attr"
    return (gain, offset) if stored else (None, 0.0)


RULES = (RaiseRmsNorm(), FoldRmsNormGain(), NormalizeInInputDtype())
