"""Write `aten.scaled_dot_product_attention` as `fxopt::attention`.

    sdpa(q, k, v, mask, scale=s)   =   attention(q, k, v, mask=mask, scale=s)

Shapes: q [B, H, S, D]; k, v [B, Hk, T, D]; mask broadcasts to [B, H, S, T].
Exactness: bit-equal in the reference, which calls the same operator.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import fixed, same_size

aten = torch.ops.aten
fxopt = torch.ops.fxopt


class RaiseScaledDotProduct(Rule):
    """`scaled_dot_product_attention(q, k, v)` becomes `attention(q, k, v)`."""

    detail = "attention"

    def pattern(self, op: PatternOperators, q: Variable, k: Variable, v: Variable) -> Any:
        return op.scaled_dot_product_attention(q, k, v, ...)

    def check(self, program: Program, match: Match) -> str | None:
        root = match.root
        if argument(root, "dropout_p"):
            return "attention drops probabilities at random, as in training"
        q, k = shape_of(match.q), shape_of(match.k)
        if not same_size(q[0], k[0]) or len(q) not in (3, 4):
            return "queries, keys and values are not [batch, heads, length, size] of one batch"
        if argument(root, "is_causal") and not same_size(q[-2], k[-2]):
            return (
                "is_causal aligns the first query with the first key, attention the last with "
                "the last, and the two lengths are not known to be equal"
            )
        if argument(root, "scale") is None and fixed(q[-1]) is None:
            return "the size of a head, which sets the scale, is not fixed"
        return _check_heads(match)

    def rewrite(self, build: Builder, match: Match) -> Node:
        root = match.root
        scale = argument(root, "scale")
        scale = (fixed(shape_of(match.q)[-1]) or 1) ** -0.5 if scale is None else scale
        q, k, v = (_with_heads(build, x) for x in (match.q, match.k, match.v))
        mask = argument(root, "attn_mask")
        if mask is not None:
            mask = with_four_axes(build, _with_heads(build, mask) if q is not match.q else mask)
        causal = bool(argument(root, "is_causal"))
        out = build.call(
            fxopt.attention.default, q, k, v, None, mask, None, float(scale), causal, None, None
        )
        return out if q is match.q else build.call(aten.squeeze.dim, out, 1)


def _check_heads(match: Match) -> str | None:
    if len(shape_of(match.q)) == 3:
        return None
    q, k, v = (fixed(shape_of(x)[1]) for x in (match.q, match.k, match.v))
    if q is None or k is None or k != v or q % k:
        return "the heads of queries, keys and values do not fit together"
    return None


def with_four_axes(build: Builder, mask: Node) -> Node:
    """Put axes of size one before a mask, so that it broadcasts against [B, H, S, T] by itself."""
    while len(shape_of(mask)) < 4:
        mask = build.call(aten.unsqueeze.default, mask, 0)
    return mask


def _with_heads(build: Builder, x: Node) -> Node:
    """Write [B, S, D] as one head, [B, 1, S, D]."""
    return build.call(aten.unsqueeze.default, x, 1) if len(shape_of(x)) == 3 else x


RULES = (RaiseScaledDotProduct(),)
