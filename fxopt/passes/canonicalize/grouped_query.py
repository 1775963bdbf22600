"""Let attention repeat keys and values by itself.

    attention(q, repeat(k, G), repeat(v, G))   =   attention(q, k, v)

Shapes: q [B, G Hk, S, D]; k, v [B, Hk, T, D]; repeat gives each head G times in a row.
Exactness: bit-equal in the reference; a kernel may sum in another order.
Source: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints, EMNLP 2023, arXiv:2305.13245.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, all_arguments, packet_of
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import axis_of, fixed, same_size, same_sizes

aten = torch.ops.aten
fxopt = torch.ops.fxopt


class FoldRepeatedHeads(Rule):
    """`attention(q, repeat(k), repeat(v))` becomes `attention(q, k, v)`."""

    def pattern(self, op: PatternOperators, q: Variable, k: Variable, v: Variable) -> Any:
        return op.call(fxopt.attention, q, k, v, ...)

    def condition(self, program: Program, match: Match) -> bool:
        k, v = repeated_heads(match.k), repeated_heads(match.v)
        return k is not None and v is not None and same_size(shape_of(k)[1], shape_of(v)[1])

    def rewrite(self, build: Builder, match: Match) -> Node:
        k, v = repeated_heads(match.k), repeated_heads(match.v)
        return build.call(fxopt.attention.default, match.q, k, v, *match.root.args[3:])


def repeated_heads(node: Node) -> Node | None:
    """The tensor [B, Hk, T, D] whose heads a node [B, H, T, D] repeats, each G times in a row."""
    if packet_of(node) is aten.repeat_interleave:
        source, count, axis, *_ = all_arguments(node)
        along_heads = axis is not None and axis_of(node, axis) == 1 and isinstance(count, int)
        return source if along_heads and len(shape_of(node)) == 4 else None
    if packet_of(node) is not aten.reshape:
        return None
    spread: Node = node.all_input_nodes[0]
    single = spread.all_input_nodes[0] if packet_of(spread) is aten.expand else None
    if single is None or packet_of(single) is not aten.unsqueeze or len(shape_of(spread)) != 5:
        return None
    source = single.all_input_nodes[0]
    batch, heads, count, *rest = shape_of(spread)
    if axis_of(single, all_arguments(single)[1]) != 2 or None in (fixed(heads), fixed(count)):
        return None
    same = same_sizes(shape_of(node), [batch, heads * count, *rest])
    return source if same and same_sizes(shape_of(source), [batch, heads, *rest]) else None


RULES = (FoldRepeatedHeads(),)
