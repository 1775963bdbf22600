"""Raise softmax attention from its small operators to `fxopt::attention`.

    softmax(scale * q k^T + mask) v   =   attention(q, k, v, mask=mask, scale=scale)

Shapes: q [B, H, S, D]; k [B, H, T, D]; v [B, H, T, E]; mask broadcasts to [B, H, S, T]. Models
    also write [B H, S, D] (bmm), and one head without an axis for it.
Exactness: equal over the reals. A score that a model *replaces* by a number is here a score to
    which the number is *added*; that is the same only for numbers that drown every score, so any
    other fill is refused. Masks stay additive: where nothing is visible, a finite fill gives the
    average of all values, as it did in the model.
Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv:1706.03762.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import math
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.canonicalize.cleanup import holds_every_value, is_transparent_cast
from fxopt.passes.canonicalize.rms_norm import cast
from fxopt.passes.canonicalize.scores import Scores, Term, read_scores
from fxopt.passes.canonicalize.sdpa import with_four_axes
from fxopt.passes.canonicalize.views import permute
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, packet_of
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_size, same_sizes

aten = torch.ops.aten
fxopt = torch.ops.fxopt
DROWNS = -1e30  # added to it, no score of a working model survives even in float64


class RaiseAttention(Rule):
    """`softmax(scores) @ v` becomes `attention(q, k, v, mask)`."""

    detail = "attention"

    def pattern(self, op: PatternOperators, probabilities: Variable, v: Variable) -> list[Any]:
        return [op.matmul(probabilities, v), op.bmm(probabilities, v)]

    def condition(self, program: Program, match: Match) -> bool:
        return read_attention(match.probabilities) is not None and isinstance(match.v, Node)

    def check(self, program: Program, match: Match) -> str | None:
        scores = read_attention(match.probabilities)
        if scores is None or scores.obstacle is not None:
            return scores and scores.obstacle
        return (
            _check_readers(match)
            or _check_axes(scores, match.v)
            or _check_terms(scores)
            or _check_dtypes(scores, match)
        )

    def rewrite(self, build: Builder, match: Match) -> Node:
        scores = read_attention(match.probabilities)
        assert scores is not None  # noqa: S101 - `condition` looked
        heads = count_heads(scores)
        q, k, v = scores.q, swap_last(build, scores.transposed_k), _without_casts(match.v)
        out = build.call(
            fxopt.attention.default,
            *(with_heads(build, x, heads) for x in (q, k, v)),
            None,
            build_mask(build, scores, heads),
            None,
            float(scores.scale),
            False,
            None,
            scores.softcap,
        )
        if len(shape_of(match.root)) == 3:
            sizes = [-1, build.size(q, -2), build.size(v, -1)]
            out = build.call(aten.reshape.default, out, sizes)
        return cast(build, out, dtype_of(match.root))


def read_attention(probabilities: Any) -> Scores | None:
    """The scores under a softmax over its last axis, through casts and reshapes."""
    node = probabilities
    while isinstance(node, Node) and packet_of(node) in (aten.to, aten.reshape):
        node = node.all_input_nodes[0]
    if not isinstance(node, Node) or packet_of(node) not in (aten.softmax, aten._softmax):
        return None
    if axis_of(node, node.args[1]) != len(shape_of(node)) - 1:  # type: ignore[arg-type]
        return None
    return read_scores(node.args[0])


def count_heads(scores: Scores) -> int:
    """How many heads a product over [B H, S, D] runs over; 1 if nothing tells."""
    if len(shape_of(scores.q)) == 4:
        return fixed(shape_of(scores.q)[1]) or 1
    split = fixed(scores.heads)
    return split or _heads_before_merge(scores.q) or 1


def _heads_before_merge(q: Node) -> int | None:
    """The heads of q [B H, S, D] that was reshaped from [B, H, S, D] or from [S, B, H D]."""
    if packet_of(q) is aten.transpose:
        merged = q.all_input_nodes[0]
        whole = merged.all_input_nodes[0] if packet_of(merged) is aten.reshape else None
        if whole is None or len(shape_of(whole)) != 3:
            return None
        width, head = fixed(shape_of(whole)[-1]), fixed(shape_of(q)[-1])
        same_length = same_size(shape_of(whole)[0], shape_of(q)[1])
        return width // head if same_length and width and head else None
    whole = q.all_input_nodes[0] if packet_of(q) is aten.reshape else None
    if whole is None or len(shape_of(whole)) != 4:
        return None
    return fixed(shape_of(whole)[1]) if same_sizes(shape_of(whole)[2:], shape_of(q)[1:]) else None


def with_heads(build: Builder, x: Node, heads: int) -> Node:
    """Split [B H, S, D] into [B, H, S, D]; four dimensions stay."""
    if len(shape_of(x)) == 4:
        return x
    sizes = [-1, heads, build.size(x, 1), build.size(x, 2)]
    return build.call(aten.reshape.default, x, sizes)


def swap_last(build: Builder, x: Node) -> Node:
    """Exchange the last two axes."""
    rank = len(shape_of(x))
    return permute(build, x, [*range(rank - 2), rank - 1, rank - 2])


def build_mask(build: Builder, scores: Scores, heads: int) -> Node | None:
    """What the model does to the scores, done to a score of zero."""
    dtype = dtype_of(scores.q)
    mask: Node | None = None
    for term in scores.terms:
        node = term.node
        if term.rank == 3 and len(shape_of(node)) == 3 and fixed(shape_of(node)[0]) != 1:
            node = with_heads(build, node, heads)
        if term.fill is not None:
            mask = _fill(build, term, node, mask, dtype)
            continue
        node = _narrow(build, node, dtype)
        if term.factor != 1:
            node = build.call(aten.mul.Tensor, node, term.factor)
        mask = node if mask is None else build.call(aten.add.Tensor, mask, node)
    return None if mask is None else with_four_axes(build, mask)


def _fill(build: Builder, term: Term, node: Node, mask: Node | None, dtype: Any) -> Node:
    fill = term.fill or 0.0
    if math.isfinite(fill):
        fill = max(fill, torch.finfo(dtype).min)
    if mask is None:
        device = node.meta["val"].device
        mask = build.call(aten.full.default, [], 0.0, dtype=dtype, device=device)
    if term.keep:
        return build.call(aten.where.ScalarOther, node, mask, fill)
    return build.call(aten.where.ScalarSelf, node, fill, mask)


def _narrow(build: Builder, mask: Node, dtype: Any) -> Node:
    """The mask in the dtype of the queries; the lowest float32 must not become -inf there."""
    if holds_every_value(dtype, dtype_of(mask)):
        return cast(build, mask, dtype)
    lowest = torch.finfo(dtype).min
    return cast(build, build.call(aten.clamp.default, mask, lowest), dtype)


def _without_casts(v: Node) -> Node:
    while packet_of(v) is aten.to and holds_every_value(dtype_of(v), dtype_of(v.args[0])):
        v = v.all_input_nodes[0]
    return v


def _check_readers(match: Match) -> str | None:
    node = match.probabilities
    while True:
        if len(node.users) > 1:
            return "the attention probabilities are read elsewhere too"
        if packet_of(node) is aten.to and not is_transparent_cast(node):
            return "the attention probabilities are converted to or from integers"
        if packet_of(node) in (aten.softmax, aten._softmax):
            return None
        node = node.all_input_nodes[0]


def _check_axes(scores: Scores, v: Node) -> str | None:
    shapes = [shape_of(node) for node in (scores.q, scores.transposed_k, v)]
    ranks = {len(shape) for shape in shapes}
    if not ranks <= {3, 4} or len(shapes[0]) != len(shapes[1]):
        return f"the queries, keys and values have {sorted(ranks)} dimensions; attention takes 4"
    if len(ranks) == 2:
        return None if scores.heads is not None else "the values have other axes than the scores"
    if not all(same_size(shape[0], shapes[0][0]) for shape in shapes[1:]):
        return "queries, keys and values are not known to have one batch size"
    if ranks == {4}:
        q, k, value = (fixed(shape[1]) for shape in shapes)
        if q is None or k is None or k != value or q % k:
            return "the heads of queries, keys and values do not fit together"
    return None


def _check_terms(scores: Scores) -> str | None:
    for term in scores.terms:
        if term.fill is not None and term.fill > DROWNS:
            return (
                f"masked scores are set to {term.fill:g}, which is not low enough to drown a "
                "score, so a row with nothing visible would change"
            )
        if term.rank == 4 and term.fill is None and dtype_of(term.node) == torch.bool:
            return "a boolean mask is added to the scores as numbers"
    return None


def _check_dtypes(scores: Scores, match: Match) -> str | None:
    dtypes = {dtype_of(x) for x in (scores.q, scores.transposed_k, _without_casts(match.v))}
    if len(dtypes) > 1:
        return "queries, keys and values have different dtypes"
    return None


RULES = (RaiseAttention(),)
