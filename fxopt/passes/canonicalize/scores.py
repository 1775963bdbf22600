"""Read attention scores back to their queries, keys, scale and mask.

    scores = softcap(scale * q k^T) + m1 + m2, masked by fills

is what models write with matmul, bmm or baddbmm, scaled before or after the product, with
masks added, filled or chosen, casts and reshapes in between. Reading changes nothing.

Shapes: q [..., S, D]; k [..., T, D]; scores [..., S, T]; masks broadcast against the scores.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import dtype_of, shape_of
from fxopt.passes.canonicalize.cleanup import holds_every_value, is_transparent_cast
from fxopt.rewrite.pattern import argument, packet_of, plain_packet
from fxopt.rewrite.sizes import same_sizes

aten = torch.ops.aten
_DEPTH = 16  # calls between softmax and the product; models need about six


@dataclass(frozen=True)
class Term:
    """Something added to the scores: `factor * node`, or `fill` where a mask is set.

    `rank` is the rank of the scores there. With a fill, `node` is boolean and `keep` says whether
    True keeps the score or replaces it.
    """

    node: Node
    rank: int
    factor: float = 1.0
    fill: float | None = None
    keep: bool = False


@dataclass(frozen=True)
class Scores:
    """`softcap(scale * q k^T) + terms`; `transposed_k` is [..., D, T]."""

    product: Node
    q: Node
    transposed_k: Node
    scale: float = 1.0
    softcap: float | None = None
    terms: tuple[Term, ...] = field(default=())
    heads: Any = None  # what a reshape split off the batch of a three-dimensional product
    obstacle: str | None = None

    def scaled(self, factor: float) -> "Scores":
        """The scores times a number."""
        terms = tuple(replace(term, factor=term.factor * factor) for term in self.terms)
        obstacle = self.obstacle
        if self.softcap is not None or any(term.fill is not None for term in self.terms):
            obstacle = "the scores are scaled after they were capped or filled"
        return replace(self, scale=self.scale * factor, terms=terms, obstacle=obstacle)


def read_scores(node: Any, depth: int = _DEPTH) -> Scores | None:
    """What a node computes, if it is attention scores; None if it is anything else."""
    if not isinstance(node, Node) or node.op != "call_function" or not depth:
        return None
    reader = _READERS.get(packet_of(node))
    return reader(node, depth - 1) if reader is not None else None


def strip_scale(node: Node) -> tuple[Node, float]:
    """A node without the numbers it is multiplied by and the casts that lose nothing."""
    factor = 1.0
    while node.op == "call_function":
        packet = plain_packet(node)
        scalar = node.args[1] if packet in (aten.mul, aten.div) else None
        if isinstance(scalar, int | float):
            factor = factor * scalar if packet is aten.mul else factor / scalar
        elif not _is_lossless_cast(node):
            break
        node = node.all_input_nodes[0]
    return node, factor


def _is_lossless_cast(node: Node) -> bool:
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    return packet_of(node) is aten.to and holds_every_value(dtype_of(node), dtype_of(source))


def _product(node: Node, depth: int) -> Scores | None:
    q, k = node.args[:2]
    return _scores_of(node, q, k) if isinstance(q, Node) and isinstance(k, Node) else None


def _scores_of(node: Node, q: Node, k: Node) -> Scores:
    (q, a), (k, b) = strip_scale(q), strip_scale(k)
    return Scores(node, q, k, a * b)


def _biased_product(node: Node, depth: int) -> Scores:
    bias, q, k = node.all_input_nodes[:3]
    scores = _scores_of(node, q, k).scaled(float(argument(node, "alpha")))
    beta = float(argument(node, "beta"))
    return replace(scores, terms=(Term(bias, 3, beta),)) if beta else scores


def _cast_or_view(node: Node, depth: int) -> Scores | None:
    inner = read_scores(node.all_input_nodes[0], depth)
    if inner is None:
        return None
    if packet_of(node) is aten.to:
        obstacle = (
            None if is_transparent_cast(node) else "the scores are converted to or from integers"
        )
        return replace(inner, obstacle=inner.obstacle or obstacle)
    if not same_sizes(shape_of(node)[-2:], shape_of(inner.product)[-2:]):
        return None
    return replace(inner, heads=shape_of(node)[1]) if len(shape_of(node)) == 4 else inner


def _scaled(node: Node, depth: int) -> Scores | None:
    value, number = node.args[:2]
    if not isinstance(number, int | float) or plain_packet(node) is None:
        return None
    if packet_of(node) is aten.mul and (capped := _capped(value, float(number), depth)):
        return capped
    inner = read_scores(value, depth)
    return inner and inner.scaled(1 / number if packet_of(node) is aten.div else number)


def _capped(value: Any, cap: float, depth: int) -> Scores | None:
    """`tanh(scores / cap) * cap`."""
    if not isinstance(value, Node) or packet_of(value) is not aten.tanh:
        return None
    inner = read_scores(value.args[0], depth)
    if inner is None:
        return None
    obstacle = inner.obstacle
    if inner.terms or inner.softcap is not None:
        obstacle = "the scores are capped after a mask was added"
    return replace(inner, scale=inner.scale * cap, softcap=cap, obstacle=obstacle)


def _sum(node: Node, depth: int) -> Scores | None:
    sign = float(argument(node, "alpha") * (-1 if packet_of(node) is aten.sub else 1))
    rank = len(shape_of(node))
    first, second = node.args[:2]
    if isinstance(second, Node) and (inner := read_scores(first, depth)):
        return replace(inner, terms=(*inner.terms, Term(second, rank, sign)))
    if isinstance(first, Node) and sign == 1 and (inner := read_scores(second, depth)):
        return replace(inner, terms=(*inner.terms, Term(first, rank)))
    return None


def _filled(node: Node, depth: int) -> Scores | None:
    if packet_of(node) is aten.masked_fill:
        value, mask, fill = node.args
        keep = False
    elif isinstance(node.args[2], Node):
        mask, fill, value = node.args
        keep = False
    else:
        mask, value, fill = node.args
        keep = True
    inner = read_scores(value, depth)
    if inner is None or not isinstance(mask, Node) or not isinstance(fill, int | float):
        return None
    return replace(
        inner, terms=(*inner.terms, Term(mask, len(shape_of(node)), 1.0, float(fill), keep))
    )


_READERS: dict[Any, Any] = {
    aten.matmul: _product,
    aten.bmm: _product,
    aten.baddbmm: _biased_product,
    aten.to: _cast_or_view,
    aten.reshape: _cast_or_view,
    aten.mul: _scaled,
    aten.div: _scaled,
    aten.add: _sum,
    aten.sub: _sum,
    aten.masked_fill: _filled,
    aten.where: _filled,
}
