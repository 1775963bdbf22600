"""A sample for every operator that has a rule, and which changes pass through it.

This is a statement of the mathematics, made apart from the rules: of the changes in `judged`,
exactly those in `passing` go from weights called "before" (or "query") to weights called "after"
(or "key").
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tests.analysis.bench import Bench, Operator, before_norm, on_values, sandwich

aten = torch.ops.aten
fxopt = torch.ops.fxopt

CHANNELS = "scale sign permute rotate"
ALL = f"{CHANNELS} centre heads"


@dataclass(frozen=True)
class Sample:
    """One graph around an operator."""

    target: Any
    name: str
    build: Callable[[Bench], Sequence[Node]]
    judged: frozenset[str]
    passing: frozenset[str]
    positive: bool = False
    ends: tuple[str, str] = ("before", "after")

    def __str__(self) -> str:
        return f"{getattr(self.target, '__name__', self.target)}-{self.name}"


SAMPLES: list[Sample] = []


def sample(
    target: Any,
    name: str,
    build: Callable[[Bench], Sequence[Node]],
    passing: str,
    judged: str = CHANNELS,
    **more: Any,
) -> None:
    """Enter one sample."""
    words = frozenset(passing.split())
    assert words <= frozenset(judged.split())
    SAMPLES.append(Sample(target, name, build, frozenset(judged.split()), words, **more))


def everywhere(target: Any, op: Operator, passing: str, name: str = "", **more: Any) -> None:
    """An operator on one tensor: between linears, in front of a norm, on the values of heads."""
    for place, build, judged in (
        ("channels", sandwich(op), CHANNELS),
        ("norm", before_norm(op), "centre"),
        ("heads", on_values(op), "heads"),
    ):
        words = " ".join(w for w in passing.split() if w in judged.split())
        sample(target, f"{name}{place}", build, words, judged, **more)


def apply(target: Any, *arguments: Any) -> Operator:
    """The operator with its further arguments."""
    return lambda g, x: g.call(target, x, *arguments)


def then_number(op: Operator) -> Operator:
    """An operator that answers yes or no, and its answer as a number."""
    return lambda g, x: g.call(aten.to.dtype, op(g, x), torch.float64)


def after_relu(op: Operator) -> Operator:
    """An operator that sees exact zeros."""
    return lambda g, x: op(g, g.call(aten.relu.default, x))


# --- functions of one element -------------------------------------------------------------------

for _target in (
    aten.neg.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
):
    everywhere(_target, apply(_target), ALL)
for _target in (aten.relu.default, aten.leaky_relu.default, aten.abs.default):
    everywhere(_target, apply(_target), "scale permute heads")
for _target in (aten.tanh.default, aten.sin.default, aten.erf.default):
    everywhere(_target, apply(_target), "sign permute heads")
for _target in (
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.mish.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.softplus.default,
    aten.elu.default,
    aten.exp.default,
    aten.cos.default,
    aten.square.default,
):
    everywhere(_target, apply(_target), "permute heads")
for _target in (
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
):
    everywhere(_target, apply(_target), "permute heads", positive=True)
everywhere(aten.pow.Tensor_Scalar, apply(aten.pow.Tensor_Scalar, 2), "permute heads")
everywhere(aten.clamp.default, apply(aten.clamp.default, -0.5, 0.7), "permute heads")
for _target in (
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
):
    everywhere(_target, after_relu(then_number(apply(_target, 0.0))), "permute heads")


def _flipped(target: Any) -> Operator:
    return then_number(lambda g, x: g.call(target, g.call(aten.gt.Scalar, x, 0.2)))


for _target in (aten.bitwise_not.default, aten.logical_not.default):
    everywhere(_target, _flipped(_target), "permute heads")
everywhere(aten.to.dtype, apply(aten.to.dtype, torch.float64), ALL)
everywhere(aten.to.dtype, then_number(apply(aten.gt.Scalar, 0.2)), "permute heads", "bool-")


# --- two tensors --------------------------------------------------------------------------------


def two(target: Any, end: bool = False) -> Callable[[Bench], Sequence[Node]]:
    """Two linears that meet; behind them a linear, with a norm in front of it if `end`."""

    def build(g: Bench) -> Sequence[Node]:
        x = g.x()
        met = g.call(target, g.linear("before.a", x), g.linear("before.b", x))
        if end:
            met = g.call(aten.layer_norm.default, met, [g.sizes.width])
        return [g.linear("after", met)]

    return build


def two_conditions(target: Any) -> Callable[[Bench], Sequence[Node]]:
    """Two linears, each turned to yes and no, that meet."""

    def build(g: Bench) -> Sequence[Node]:
        x = g.x()
        a, b = (g.call(aten.gt.Scalar, g.linear(f"before.{name}", x), 0.0) for name in ("a", "b"))
        met = g.call(aten.to.dtype, g.call(target, a, b), torch.float64)
        return [g.linear("after", met)]

    return build


def two_zeros(target: Any) -> Callable[[Bench], Sequence[Node]]:
    """Two comparisons that see equal numbers."""

    def build(g: Bench) -> Sequence[Node]:
        x = g.x()
        a, b = (g.call(aten.relu.default, g.linear(f"before.{n}", x)) for n in ("a", "b"))
        met = g.call(aten.to.dtype, g.call(target, a, b), torch.float64)
        return [g.linear("after", met)]

    return build


for _target in (aten.add.Tensor, aten.sub.Tensor):
    sample(_target, "two", two(_target), CHANNELS)
    sample(_target, "two-norm", two(_target, end=True), "centre", "centre")
    everywhere(_target, apply(_target, 0.5), "permute heads", "number-")
sample(aten.mul.Tensor, "two", two(aten.mul.Tensor), "scale sign permute")
sample(aten.mul.Tensor, "two-norm", two(aten.mul.Tensor, end=True), "", "centre")
everywhere(aten.mul.Tensor, apply(aten.mul.Tensor, 0.5), ALL, "number-")
sample(aten.div.Tensor, "two", two(aten.div.Tensor), "scale sign permute", positive=True)
everywhere(aten.div.Tensor, apply(aten.div.Tensor, 3.0), ALL, "number-")
for _target in (aten.maximum.default, aten.minimum.default):
    sample(_target, "two", two(_target), "permute")
for _target in (
    aten.eq.Tensor,
    aten.le.Tensor,
    aten.lt.Tensor,
    aten.ge.Tensor,
    aten.gt.Tensor,
):
    sample(_target, "two", two_zeros(_target), "permute")
for _target in (aten.logical_and.default, aten.logical_or.default):
    sample(_target, "two", two_conditions(_target), "permute")


def column(target: Any, inside: bool) -> Operator:
    """Meets a tensor [B, S, 1], the same for every channel: an input, or a linear's result."""

    def op(g: Bench, x: Node) -> Node:
        full = x.meta["val"].shape
        shape = [full[0], *[1] * (len(full) - 3), full[-2], 1]
        given = g.x(*shape[:-1], 3)
        other = g.linear("column", given, 1) if inside else g.x(*shape)
        return g.call(target, x, other)

    return op


for _inside in (False, True):
    _name = "inner-" if _inside else ""
    everywhere(aten.mul.Tensor, column(aten.mul.Tensor, _inside), ALL, f"{_name}column-")
    _passing = "scale sign permute heads" if _inside else "permute heads"
    everywhere(aten.add.Tensor, column(aten.add.Tensor, _inside), _passing, f"{_name}column-")


def with_weight(target: Any, *shape: str) -> Operator:
    """Meets a weight, whose axes are named by the sizes of the sample."""

    def op(g: Bench, x: Node) -> Node:
        named = {"width": int(x.meta["val"].shape[-1]), "length": g.sizes.length, "one": 1}
        return g.call(target, x, g.weight("before.vector", *(named[axis] for axis in shape)))

    return op


for _shape in (("width",), ("length", "width")):
    _name = f"weight-{len(_shape)}"
    _add, _mul = with_weight(aten.add.Tensor, *_shape), with_weight(aten.mul.Tensor, *_shape)
    sample(aten.add.Tensor, _name, sandwich(_add), CHANNELS)
    sample(aten.add.Tensor, f"{_name}-norm", before_norm(_add), "centre", "centre")
    sample(aten.mul.Tensor, _name, sandwich(_mul), "scale sign permute")
    sample(aten.mul.Tensor, f"{_name}-norm", before_norm(_mul), "", "centre")
for _shape in ((), ("one",), ("length", "one")):
    _name = f"weight-one-{len(_shape)}"
    _add, _mul = with_weight(aten.add.Tensor, *_shape), with_weight(aten.mul.Tensor, *_shape)
    sample(aten.mul.Tensor, _name, sandwich(_mul), CHANNELS)
    if _shape in ((), ("one",)):  # one number takes no factor up, so that none can pass it
        sample(aten.add.Tensor, _name, sandwich(_add), "permute")


def _offset_gain(g: Bench) -> Sequence[Node]:
    gain = g.call(aten.add.Tensor, g.weight("before.gain", 5), 1.0)
    return [g.linear("after", g.call(aten.rms_norm.default, g.x(), [5], gain, 1e-5))]


sample(aten.add.Tensor, "offset-gain", _offset_gain, "scale sign")


def choice(number: float | None, target: Any = aten.where.self) -> Operator:
    """Some elements come from a second linear, or are a number."""

    def op(g: Bench, x: Node) -> Node:
        condition = g.call(aten.gt.Scalar, g.x(*x.meta["val"].shape), 0.0)
        if target is aten.masked_fill.Scalar:
            return g.call(target, x, condition, number)
        if target is aten.where.ScalarSelf:
            return g.call(target, condition, number, x)
        other = g.linear("before.other", g.x()) if number is None else number
        return g.call(target, condition, x, other)

    return op


def moving_choice(g: Bench) -> Sequence[Node]:
    """The condition is itself a hidden axis."""
    x = g.x()
    condition = g.call(aten.gt.Scalar, g.linear("before.condition", x), 0.0)
    a, b = g.linear("before.a", x), g.linear("before.b", x)
    return [g.linear("after", g.call(aten.where.self, condition, a, b))]


sample(aten.where.self, "given", sandwich(choice(None)), "scale sign")
sample(aten.where.self, "moving", moving_choice, "scale sign permute")
for _target in (aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar):
    sample(_target, "zero", sandwich(choice(0.0, _target)), "scale sign")
    sample(_target, "number", sandwich(choice(0.7, _target)), "")


def _filled(number: float, passing: str) -> None:
    def op(g: Bench, x: Node) -> Node:
        condition = g.call(aten.gt.Scalar, x, 0.2)
        return g.call(aten.masked_fill.Scalar, x, condition, number)

    everywhere(aten.masked_fill.Scalar, op, passing, f"own-{number}-")


_filled(0.0, "permute heads")
_filled(0.7, "permute heads")


def _infinite(g: Bench) -> Sequence[Node]:
    """Filled with -infinity, and read by what leaves it finite."""
    h = g.linear("before", g.x())
    condition = g.call(aten.gt.Scalar, g.x(*h.meta["val"].shape[:-1], 1), 0.3)
    filled = g.call(aten.masked_fill.Scalar, h, condition, -float("inf"))
    return [g.linear("after", g.call(aten.relu.default, filled))]


def _infinite_sign(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x())
    condition = g.call(aten.gt.Scalar, g.x(*h.meta["val"].shape[:-1], 1), 0.3)
    filled = g.call(aten.masked_fill.Scalar, h, condition, -float("inf"))
    return [g.linear("after", g.call(aten.tanh.default, filled))]


sample(aten.masked_fill.Scalar, "infinite-relu", _infinite, "scale permute")
sample(aten.masked_fill.Scalar, "infinite-tanh", _infinite_sign, "permute")


# --- sums over an axis --------------------------------------------------------------------------

everywhere(aten.linear.default, lambda g, x: x, ALL)
everywhere(aten.linear.default, lambda g, x: g.linear("between", x, g.sizes.dim), "heads", "two-")


def _embedding(norm: bool) -> Callable[[Bench], Sequence[Node]]:
    def build(g: Bench) -> Sequence[Node]:
        ids = torch.randint(0, 7, (g.sizes.batch, g.sizes.length), generator=g.random)
        table = g.weight("before.weight", 7, g.sizes.width)
        x = g.call(aten.embedding.default, table, g.given(ids))
        if norm:
            x = g.call(aten.layer_norm.default, x, [g.sizes.width])
        return [g.linear("after", x)]

    return build


sample(aten.embedding.default, "columns", _embedding(False), CHANNELS)
sample(aten.embedding.default, "norm", _embedding(True), "centre", "centre")


def _tied(g: Bench) -> Sequence[Node]:
    """Embedding and unembedding share their table: what one multiplies the other multiplies too."""
    ids = torch.randint(0, 7, (g.sizes.batch, g.sizes.length), generator=g.random)
    table = g.weight("before_after.weight", 7, g.sizes.width)
    x = g.call(aten.embedding.default, table, g.given(ids))
    return [g.call(aten.linear.default, g.linear("between", x), table)]


def _tied_stream(g: Bench) -> Sequence[Node]:
    ids = torch.randint(0, 7, (g.sizes.batch, g.sizes.length), generator=g.random)
    table = g.weight("before_after.weight", 7, g.sizes.width)
    x = g.call(aten.embedding.default, table, g.given(ids))
    x = g.call(aten.add.Tensor, x, g.linear("more", x))
    return [g.call(aten.linear.default, x, table)]


_ends = ("before", "before")
sample(aten.embedding.default, "tied", _tied, CHANNELS, ends=_ends)
sample(aten.embedding.default, "tied-stream", _tied_stream, "sign permute rotate", ends=_ends)


def _tied_norm(g: Bench) -> Sequence[Node]:
    """The table is read as a head too, to which its mean matters."""
    ids = torch.randint(0, 7, (g.sizes.batch, g.sizes.length), generator=g.random)
    table = g.weight("before_after.weight", 7, g.sizes.width)
    x = g.call(aten.embedding.default, table, g.given(ids))
    normed = g.call(aten.layer_norm.default, x, [g.sizes.width])
    return [g.call(aten.linear.default, g.linear("between", normed), table)]


sample(aten.embedding.default, "tied-norm", _tied_norm, "", "centre")


def convolution(target: Any, groups: int, norm: bool = False) -> Callable[[Bench], Sequence[Node]]:
    def build(g: Bench) -> Sequence[Node]:
        two_axes = target is aten.conv2d.default
        places, kernel = ([5, 4], [2, 3]) if two_axes else ([6], [3])
        n = 2 * g.sizes.width
        x = g.x(g.sizes.batch, 3, *places)
        bias = g.weight("before.bias", n)
        h = g.call(target, x, g.weight("before.weight", n, 3, *kernel), bias)
        if norm:
            h = g.call(aten.transpose.int, h, 1, -1)
            h = g.call(aten.layer_norm.default, h, [n])
            return [g.linear("after", h)]
        one = [1] * len(kernel)
        zero = [0] * len(kernel)
        inside = g.weight("after.weight", 4, n // groups, *one)
        return [g.call(target, h, inside, None, one, zero, one, groups)]

    return build


for _target in (aten.conv1d.default, aten.conv2d.default):
    sample(_target, "channels", convolution(_target, 1), CHANNELS)
    sample(_target, "groups", convolution(_target, 2), "")
    sample(_target, "norm", convolution(_target, 1, norm=True), "centre", "centre")


def products(target: Any, role: str) -> Callable[[Bench], Sequence[Node]]:
    """softmax(q k^T) v written out, in one head, or in several."""

    def build(g: Bench) -> Sequence[Node]:
        x = g.x()
        names = ("query", "key", "before") if role == "value" else ("before.q", "after.k", "value")
        q, k, v = (g.linear(name, x) for name in names)
        turned = g.call(aten.transpose.int, k, 1, 2)
        weights = g.call(aten.softmax.int, g.call(target, q, turned), -1)
        out = g.call(target, weights, v)
        return [g.linear("after" if role == "value" else "last", out)]

    return build


for _target in (aten.matmul.default, aten.bmm.default):
    sample(_target, "query-key", products(_target, "query"), CHANNELS)
    sample(_target, "value", products(_target, "value"), CHANNELS)


def _head_products(g: Bench) -> Sequence[Node]:
    s, x = g.sizes, g.x()
    q, k, v = (
        g.split_heads(g.linear(name, x, s.heads * s.dim), s.heads)
        for name in ("query", "key", "before")
    )
    scores = g.call(aten.matmul.default, q, g.call(aten.transpose.int, k, 2, 3))
    out = g.call(aten.matmul.default, g.call(aten.softmax.int, scores, -1), v)
    rows = g.call(aten.transpose.int, out, 1, 2)
    flat = g.call(aten.reshape.default, rows, [s.batch, s.length, s.heads * s.dim])
    return [g.linear("after", flat)]


sample(aten.matmul.default, "heads", _head_products, f"{CHANNELS} heads", f"{CHANNELS} heads")


def _stored_matrix(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x())
    return [g.call(aten.matmul.default, h, g.weight("after.weight", g.sizes.width, 4))]


sample(aten.matmul.default, "stored", _stored_matrix, CHANNELS)


def experts(activation: str, gated: bool, where: str) -> Callable[[Bench], Sequence[Node]]:
    """A mixture of experts: what changes is its input, its hidden axes, or its output."""

    def build(g: Bench) -> Sequence[Node]:
        tokens, n, e, f = g.sizes.batch * g.sizes.length + 1, g.sizes.width, 3, 5
        x = g.x(tokens, 4)
        x = g.linear("before", x, n) if where == "input" else x
        into = int(x.meta["val"].shape[-1])
        index = g.given(torch.randint(0, e, (tokens, 2), generator=g.random))
        mixing = g.given(torch.rand(tokens, 2, generator=g.random, dtype=torch.float64))
        names = {"input": ("after", "down"), "hidden": ("before", "after")}
        up, down = names.get(where, ("up", "before"))
        f_up = f * (2 if gated else 1)
        y = g.call(
            fxopt.moe.default,
            *(x, index, mixing),
            *(g.weight(f"{up}.weight", e, f_up, into), g.weight(f"{down}.weight", e, n, f)),
            *(g.weight(f"{up}.bias", e, f_up), g.weight(f"{down}.bias", e, n)),
            *(activation, gated),
        )
        return [g.linear("after", y)] if where == "output" else [y]

    return build


for _where in ("input", "output"):
    sample(fxopt.moe.default, _where, experts("silu", True, _where), CHANNELS)
for _activation, _gated, _passing in (
    ("silu", True, "scale sign permute"),
    ("gelu", False, "permute"),
    ("relu", False, "scale permute"),
    ("tanh", False, "sign permute"),
    ("identity", False, "scale sign permute"),
):
    sample(
        fxopt.moe.default,
        f"hidden-{_activation}",
        experts(_activation, _gated, "hidden"),
        _passing,
    )

for _target in (aten.sum.dim_IntList, aten.mean.dim):
    everywhere(_target, apply(_target, [1], True), "scale sign permute rotate centre", "tokens-")
    sample(_target, "channels", sandwich(apply(_target, [-1], True)), "scale sign")
    sample(_target, "all", sandwich(apply(_target, [1, 2], True)), "scale sign")
    sample(_target, "dropped", sandwich(apply(_target, [0])), CHANNELS)
SAMPLES[:] = [s for s in SAMPLES if s.name != "tokens-heads"]


# --- norms --------------------------------------------------------------------------------------


def norm(target: Any, gain: bool, bias: bool = False) -> Operator:
    """A norm of the last axis, its vectors called "between"."""

    def op(g: Bench, x: Node) -> Node:
        n = int(x.meta["val"].shape[-1])
        vectors = [g.weight("between.gain", n) if gain else None]
        if target is aten.layer_norm.default:
            vectors.append(g.weight("between.bias", n) if bias else None)
        return g.call(target, x, [n], *vectors, 1e-5)

    return op


def gain_to_linear(target: Any) -> Callable[[Bench], Sequence[Node]]:
    def build(g: Bench) -> Sequence[Node]:
        gain = g.weight("before.gain", 5)
        vectors = (
            [gain, g.weight("before.bias", 5)] if target is aten.layer_norm.default else [gain]
        )
        return [g.linear("after", g.call(target, g.x(), [5], *vectors, 1e-5))]

    return build


_rms, _layer = aten.rms_norm.default, aten.layer_norm.default
sample(_rms, "plain", sandwich(norm(_rms, False)), "sign permute rotate")
sample(_rms, "gain", sandwich(norm(_rms, True)), "sign permute")
sample(_rms, "behind", before_norm(norm(_rms, False)), "", "centre")
sample(_rms, "heads", on_values(norm(_rms, True)), "heads", "heads")
sample(_layer, "plain", sandwich(norm(_layer, False)), "permute")
sample(_layer, "gain", sandwich(norm(_layer, True)), "permute")
sample(_layer, "bias", sandwich(norm(_layer, True, True)), "permute")
sample(_layer, "centre", before_norm(lambda g, x: x), "centre", "centre")
sample(_layer, "heads", on_values(norm(_layer, True, True)), "heads", "heads")
for _target in (_rms, _layer):
    sample(_target, "linear", gain_to_linear(_target), "scale sign")


def _two_axes(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x())
    shape = [g.sizes.length, g.sizes.width]
    return [g.linear("after", g.call(_layer, h, shape, None, None, 1e-5))]


sample(_layer, "two-axes", _two_axes, "")

for _target, _more in (
    (aten.softmax.int, (-1,)),
    (aten._softmax.default, (-1, False)),
    (aten.log_softmax.int, (-1,)),
):
    everywhere(_target, apply(_target, *_more), "permute heads")
sample(aten.softmax.int, "tokens", sandwich(apply(aten.softmax.int, 1)), "permute")
for _target in (aten.amax.default, aten.amin.default):
    sample(_target, "tokens", sandwich(apply(_target, [1], True)), "scale permute")
    sample(_target, "tokens-norm", before_norm(apply(_target, [1], True)), "", "centre")
    sample(_target, "channels", sandwich(apply(_target, [-1], True)), "scale")
    sample(_target, "dropped", sandwich(apply(_target, [0])), "scale permute")


# --- attention ----------------------------------------------------------------------------------


def attention(ends: str, mask: bool = False) -> Callable[[Bench], Sequence[Node]]:
    def build(g: Bench) -> Sequence[Node]:
        s, x = g.sizes, g.x()
        q, k, v = (g.projected(role, x) for role in ("query", "key", "before"))
        bias = g.weight("mask", 1, s.heads * s.group, s.length, s.length) if mask else None
        return [g.attended(q, k, v, bias)]

    return build


def _zeros(g: Bench) -> Sequence[Node]:
    """A mask that has a place for each head and is the same for all."""
    s, x = g.sizes, g.x()
    q, k, v = (g.projected(role, x) for role in ("query", "key", "before"))
    shape = [1, s.heads * s.group, s.length, s.length]
    mask = g.call(aten.zeros.default, shape, dtype=torch.float64)
    return [g.attended(q, k, v, mask)]


_attention = fxopt.attention.default
sample(_attention, "value", attention("v"), f"{CHANNELS} heads", f"{CHANNELS} heads")
sample(_attention, "query-key", attention("q"), CHANNELS, ends=("query", "key"))
sample(_attention, "zeros", _zeros, "heads", "heads")
sample(_attention, "mask", attention("v", True), "heads", "heads centre", ends=("before", "mask"))


def _relative(g: Bench) -> Sequence[Node]:
    """A bias of each head that a table gives for each pair of positions."""
    s, x = g.sizes, g.x()
    q, k, v = (g.projected(role, x) for role in ("query", "key", "before"))
    ids = torch.randint(0, 7, (s.length, s.length), generator=g.random)
    table = g.weight("bias.weight", 7, s.heads * s.group)
    bias = g.call(
        aten.permute.default, g.call(aten.embedding.default, table, g.given(ids)), [2, 0, 1]
    )
    return [g.attended(q, k, v, g.call(aten.unsqueeze.default, bias, 0))]


sample(_attention, "relative", _relative, "heads", "heads centre", ends=("before", "bias"))


def rotary(
    interleaved: bool,
    partial: bool = False,
    rank: int = 4,
    per_head: bool = False,
    behind_tokens: bool = False,
    doubled: bool = False,
) -> Any:
    """Queries and keys [B, H, S, D] turned by angles, or as [B, S, H, D] with `behind_tokens`.

    With `doubled` the graph shows that both channels of a pair have one angle.
    """

    def turned(g: Bench, *tensors: Node) -> Node:
        if not behind_tokens:
            return g.call(fxopt.rope.default, *tensors, interleaved)
        swapped = [g.call(aten.transpose.int, tensor, 1, 2) for tensor in tensors]
        return g.call(aten.transpose.int, g.call(fxopt.rope.default, *swapped, interleaved), 1, 2)

    def build(g: Bench) -> Sequence[Node]:
        s, x = g.sizes, g.x()
        q, k, v = (g.projected(role, x) for role in ("query", "key", "before"))
        pairs = max(1, s.dim // 2 - int(partial))
        heads = s.heads if per_head else 1
        angle = torch.rand(s.batch, heads, s.length, pairs, generator=g.random, dtype=torch.double)
        if not doubled:
            angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        angle = angle[0] if rank == 3 else angle[0, 0] if rank == 2 else angle
        cos, sin = g.given(angle.cos()), g.given(angle.sin())
        if doubled and interleaved:
            cos, sin = (g.call(aten.repeat_interleave.self_int, t, 2, -1) for t in (cos, sin))
        elif doubled:
            cos, sin = (g.call(aten.cat.default, [t, t], -1) for t in (cos, sin))
        table = [cos, sin]
        both = []
        for value in (q, k):
            repeats = value.meta["val"].shape[1] // heads if per_head else 1
            own = [
                g.call(aten.repeat_interleave.self_int, t, repeats, 1) if repeats > 1 else t
                for t in table
            ]
            both.append(turned(g, value, *own))
        return [g.attended(*both, v)]

    return build


_rope = fxopt.rope.default
for _interleaved in (False, True):
    _name = "interleaved" if _interleaved else "halves"
    sample(
        _rope, _name, rotary(_interleaved), "scale permute", "scale permute", ends=("query", "key")
    )
    sample(_rope, f"{_name}-heads", rotary(_interleaved), "heads", "heads")
    sample(_rope, f"{_name}-rotate", rotary(_interleaved), "", "rotate", ends=("query", "key"))
    for _partial in (False, True):
        sample(
            _rope,
            f"{_name}-turns" + ("-partial" if _partial else ""),
            rotary(_interleaved, _partial, doubled=True),
            "rotate",
            "rotate",
            ends=("query", "key"),
        )
    sample(
        _rope,
        f"{_name}-partial",
        rotary(_interleaved, partial=True),
        "scale permute",
        "scale permute",
        ends=("query", "key"),
    )
for _rank in (2, 3):
    sample(
        _rope,
        f"rank-{_rank}",
        rotary(False, rank=_rank),
        "scale permute",
        "scale permute",
        ends=("query", "key"),
    )
sample(
    _rope,
    "per-head",
    rotary(False, per_head=True),
    "scale permute heads",
    "scale permute heads",
    ends=("query", "key"),
)
for _per_head in (False, True):
    sample(
        _rope,
        "behind-tokens-per-head" if _per_head else "behind-tokens",
        rotary(False, per_head=_per_head, behind_tokens=True),
        "scale permute heads",
        "scale permute heads",
        ends=("query", "key"),
    )


# --- views --------------------------------------------------------------------------------------


def chain(*calls: tuple[Any, ...]) -> Operator:
    def op(g: Bench, x: Node) -> Node:
        for target, *arguments in calls:
            x = g.call(target, x, *arguments)
        return x

    return op


_back = (aten.transpose.int, -1, -2)
everywhere(aten.transpose.int, chain(_back, _back), ALL)
sample(aten.permute.default, "turn", sandwich(apply(aten.permute.default, [1, 0, 2])), CHANNELS)
sample(
    aten.permute.default,
    "norm",
    before_norm(apply(aten.permute.default, [1, 0, 2])),
    "centre",
    "centre",
)
for _target, _op in (
    (aten.unsqueeze.default, chain((aten.unsqueeze.default, 2))),
    (aten.unsqueeze.default, chain((aten.unsqueeze.default, -2))),
    (aten.squeeze.dim, chain((aten.unsqueeze.default, 1), (aten.squeeze.dim, 1))),
    (
        aten.expand.default,
        chain((aten.unsqueeze.default, 0), (aten.expand.default, [3, -1, -1, -1])),
    ),
    (aten.flatten.using_ints, chain((aten.flatten.using_ints, 0, 1))),
    (aten.repeat.default, chain((aten.repeat.default, [2, 3, 1]))),
    (aten.repeat_interleave.self_int, chain((aten.repeat_interleave.self_int, 3, 1))),
    (aten.select.int, chain((aten.select.int, 1, 0))),
    (aten.select.int, chain((aten.select.int, 0, -1))),
    (aten.slice.Tensor, chain((aten.slice.Tensor, 1, 0, 1))),
    (aten.slice.Tensor, chain((aten.slice.Tensor, -1, 0, 2**63 - 1))),
    (aten.flip.default, chain((aten.flip.default, [1]))),
    (aten.flip.default, chain((aten.flip.default, [-1]))),
):
    _name = f"{len(SAMPLES)}-"
    sample(_target, f"{_name}channels", sandwich(_op), CHANNELS)
    sample(_target, f"{_name}norm", before_norm(_op), "centre", "centre")


def regrouped(target: Any) -> Operator:
    """[B, S, 2 n] as [B, S, 2, n] and back, with half of it added."""

    def op(g: Bench, x: Node) -> Node:
        b, s, n = x.meta["val"].shape
        wide = g.linear("before.wide", x, 2 * n)
        apart = g.call(target, wide, [b, s, 2, n])
        return g.call(target, apart, [b, s, 2 * n])

    return op


def _wide(target: Any) -> Callable[[Bench], Sequence[Node]]:
    return lambda g: [g.linear("after", regrouped(target)(g, g.x()))]


def _halves_added(target: Any) -> Callable[[Bench], Sequence[Node]]:
    """Two halves of one linear added: their coordinates move together."""

    def build(g: Bench) -> Sequence[Node]:
        s = g.sizes
        wide = g.linear("before", g.x(), 2 * s.width)
        apart = g.call(target, wide, [s.batch, s.length, 2, s.width])
        return [g.linear("after", g.call(aten.sum.dim_IntList, apart, [2]))]

    return build


def _tokens_merged(target: Any) -> Operator:
    def op(g: Bench, x: Node) -> Node:
        b, s, n = x.meta["val"].shape
        return g.call(target, x, [b * s, n])

    return op


for _target in (aten.reshape.default, aten.view.default):
    sample(_target, "wide", _wide(_target), CHANNELS)
    sample(_target, "halves", _halves_added(_target), CHANNELS)
    everywhere(_target, _tokens_merged(_target), "scale sign permute rotate centre", "tokens-")
SAMPLES[:] = [s for s in SAMPLES if s.name != "tokens-heads"]


def _mixed_with_tokens(g: Bench) -> Sequence[Node]:
    """Channels merged with tokens: only one factor for all of them is left."""
    b, s = g.sizes.batch, g.sizes.length
    h = g.linear("before", g.x())
    turned = g.call(aten.transpose.int, h, 1, 2)
    flat = g.call(aten.reshape.default, turned, [b, g.sizes.width * s])
    return [g.linear("after", flat)]


sample(aten.reshape.default, "mixed", _mixed_with_tokens, CHANNELS)


def _tiled(target: Any, *arguments: Any) -> Callable[[Bench], Sequence[Node]]:
    return sandwich(apply(target, *arguments))


sample(aten.repeat.default, "copies", _tiled(aten.repeat.default, [1, 1, 2]), CHANNELS)
sample(
    aten.repeat_interleave.self_int,
    "copies",
    _tiled(aten.repeat_interleave.self_int, 2, 2),
    CHANNELS,
)
sample(
    aten.select.int,
    "one-channel",
    sandwich(chain((aten.select.int, -1, 1), (aten.unsqueeze.default, -1))),
    "scale sign",
)
sample(aten.slice.Tensor, "part", sandwich(apply(aten.slice.Tensor, -1, 0, 2)), CHANNELS)
sample(aten.slice.Tensor, "last", sandwich(apply(aten.slice.Tensor, -1, -2)), CHANNELS)


def _strided(g: Bench) -> Sequence[Node]:
    """Every second channel is a gate of the one behind it."""
    wide = g.linear("before", g.x(), 2 * g.sizes.width)
    gate, up = (g.call(aten.slice.Tensor, wide, -1, i, 2**63 - 1, 2) for i in (0, 1))
    gated = g.call(aten.mul.Tensor, g.call(aten.silu.default, gate), up)
    return [g.linear("after", gated)]


sample(aten.slice.Tensor, "stride", _strided, "scale sign permute")


def _crossed(g: Bench) -> Sequence[Node]:
    """The gate of one channel lies before it, and that of the other behind it."""
    wide = g.linear("before", g.x(), 4)
    parts = g.call(aten.split.Tensor, wide, 1, -1)
    a, b, c, d = (g.call(operator.getitem, parts, i) for i in range(4))
    gate, up = g.call(aten.cat.default, [a, d], -1), g.call(aten.cat.default, [c, b], -1)
    return [g.linear("after", g.call(aten.mul.Tensor, g.call(aten.silu.default, gate), up))]


sample(aten.cat.default, "crossed", _crossed, "scale sign permute")


def pieces(target: Any, argument: Callable[[int], Any], gated: bool) -> Any:
    def build(g: Bench) -> Sequence[Node]:
        n = g.sizes.width
        wide = g.linear("before", g.x(), 2 * n)
        parts = g.call(target, wide, argument(n), -1)
        a, b = (g.call(operator.getitem, parts, i) for i in (0, 1))
        if gated:
            met = g.call(aten.mul.Tensor, g.call(aten.silu.default, a), b)
        else:
            met = g.call(aten.cat.default, [b, a], -1)
        return [g.linear("after", met)]

    return build


for _target, _argument in (
    (aten.split.Tensor, lambda n: n),
    (aten.split_with_sizes.default, lambda n: [n, n]),
    (aten.chunk.default, lambda n: 2),
):
    for _owner in (_target, operator.getitem):
        sample(_owner, f"gated-{_target}", pieces(_target, _argument, True), "scale sign permute")
        sample(_owner, f"exchanged-{_target}", pieces(_target, _argument, False), CHANNELS)


def _sized(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x())
    size = g.call(aten.sym_size.int, h, 0)
    return [g.linear("after", g.call(aten.reshape.default, h, [size, -1, g.sizes.width]))]


sample(aten.sym_size.int, "read", _sized, CHANNELS)


def joined(target: Any, axis: int, other: str) -> Callable[[Bench], Sequence[Node]]:
    """A linear's result beside another's, or beside an input."""

    def build(g: Bench) -> Sequence[Node]:
        x, s = g.x(), g.sizes
        a = g.linear("before.a", x)
        more = s.width + (axis == -1 and target is aten.cat.default)
        b = g.linear("before.b", x, more) if other == "linear" else g.x(s.batch, s.length, more)
        return [g.linear("after", g.call(target, [a, b], axis))]

    return build


sample(aten.cat.default, "channels", joined(aten.cat.default, -1, "linear"), CHANNELS)
sample(aten.cat.default, "channels-input", joined(aten.cat.default, -1, "input"), CHANNELS)
sample(aten.cat.default, "tokens", joined(aten.cat.default, 1, "linear"), CHANNELS)
sample(aten.cat.default, "tokens-input", joined(aten.cat.default, 1, "input"), "")
sample(aten.stack.default, "new", joined(aten.stack.default, 2, "linear"), CHANNELS)
sample(aten.stack.default, "input", joined(aten.stack.default, 2, "input"), "")


def _picked(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x())
    index = torch.randint(0, g.sizes.batch, (4,), generator=g.random)
    return [g.linear("after", g.call(aten.index.Tensor, h, [g.given(index)]))]


def _picked_channels(g: Bench) -> Sequence[Node]:
    h = g.call(aten.transpose.int, g.linear("before", g.x()), 0, 2)
    index = torch.randint(0, g.sizes.width, (4,), generator=g.random)
    picked = g.call(aten.index.Tensor, h, [g.given(index)])
    return [g.linear("after", g.call(aten.transpose.int, picked, 0, 2))]


sample(aten.index.Tensor, "batch", _picked, CHANNELS)
sample(aten.index.Tensor, "channels", _picked_channels, "")


def reordered(axis: int) -> Operator:
    """An axis in another order, which is stored."""

    def op(g: Bench, x: Node) -> Node:
        order = torch.randperm(int(x.meta["val"].shape[axis]), generator=g.random)
        return g.call(aten.index_select.default, x, axis, g.build.weight("order", order))

    return op


for _axis in (1, -1):
    sample(aten.index_select.default, f"axis {_axis}", sandwich(reordered(_axis)), CHANNELS)


def _matrix(g: Bench) -> Sequence[Node]:
    h = g.linear("before", g.x(g.sizes.length + 1, 5))
    turned = g.call(aten.t.default, g.call(aten.relu.default, g.call(aten.t.default, h)))
    return [g.linear("after", turned)]


sample(aten.t.default, "matrix", _matrix, "scale permute")
