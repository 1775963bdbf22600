"""Patterns: model code on variables, matched against a graph from the root upwards.

    op.mul(x, op.rsqrt(op.add(op.mean(op.pow(x, 2), [-1], True), eps)))

reads as the computation it finds. A variable that occurs twice must bind the same value both
times; `add` and `mul` match with their operands in either order.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

COMMUTATIVE = frozenset({"add", "mul", "logical_and", "bitwise_and", "maximum", "minimum"})
Predicate = Callable[[Any], bool]
_INTERIOR = ""  # no variable is called this


@dataclass(frozen=True)
class Variable:
    """Matches anything that `where` accepts, and binds it under its name."""

    name: str
    where: Predicate | None = None


@dataclass(frozen=True)
class Call:
    """Matches one call of an operator (any overload of `packets`) on matching arguments."""

    packets: tuple[Any, ...]
    args: tuple[Any, ...]
    commutative: bool = False
    name: str = ""


@dataclass(frozen=True)
class Either:
    """Matches the first of several patterns that fits."""

    options: tuple[Any, ...]


Bindings = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """One occurrence of a pattern: its root node and what the variables stand for."""

    root: Node
    bindings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def interior(self) -> frozenset[Node]:
        """The calls that the pattern matched, root included: what a replacement replaces."""
        return frozenset(self.bindings.get(_INTERIOR, (self.root,)))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.bindings[name]
        except KeyError:
            raise AttributeError(name) from None


class PatternOperators:
    """`op` in a rule's `pattern`: each attribute builds a call of the ATen operator it names."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        if name.startswith("__"):
            raise AttributeError(name)
        packet = getattr(aten, name)
        return lambda *args: Call((packet,), args, name in COMMUTATIVE)

    def call(self, target: Any, *args: Any) -> Call:
        """A call of an operator outside `aten`, for instance `torch.ops.fxopt.rope`."""
        return Call((target,), args)

    def either(self, *options: Any) -> Either:
        """The first of several patterns that fits."""
        return Either(options)

    def cast(self, pattern: Any) -> Either:
        """The pattern, with or without a dtype conversion around it."""
        conversion = Call((aten.to, aten._to_copy, aten.type_as), (pattern, ...))
        twice = Call((aten.to, aten._to_copy, aten.type_as), (conversion, ...))
        return Either((pattern, conversion, twice))

    def variable(self, name: str, where: Predicate | None = None) -> Variable:
        """A variable with a condition on what it may bind."""
        return Variable(name, where)

    def named(self, name: str, pattern: Call) -> Call:
        """The call, with its node bound under `name` for `check` and `rewrite`."""
        return Call(pattern.packets, pattern.args, pattern.commutative, name)


def matches(pattern: Any, root: Node) -> Iterator[Match]:
    """Every way in which a pattern fits at a node; operand orders make several."""
    for bindings in _match(pattern, root, {}):
        yield Match(root, bindings)


def match(pattern: Any, root: Node) -> Match | None:
    """The first way in which a pattern fits at a node, or None."""
    return next(matches(pattern, root), None)


def root_packets(pattern: Any) -> set[Any]:
    """The operators at which a pattern can match; used to skip nodes quickly."""
    if isinstance(pattern, Either):
        return {packet for option in pattern.options for packet in root_packets(option)}
    return set(pattern.packets) if isinstance(pattern, Call) else set()


def packet_of(node: Node) -> Any:
    """The overload packet of a call node (`aten.add` for `aten.add.Tensor`), or its target."""
    return getattr(node.target, "overloadpacket", node.target)


def plain_packet(value: Any) -> Any:
    """The packet of a call without keywords (`alpha`, `rounding_mode`), else None."""
    plain = isinstance(value, Node) and value.op == "call_function" and not value.kwargs
    return packet_of(value) if plain else None


def _match(pattern: Any, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if isinstance(pattern, Variable):
        yield from _match_variable(pattern, value, bound)
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _match(option, value, bound)
    elif isinstance(pattern, Call):
        yield from _match_call(pattern, value, bound)
    elif isinstance(pattern, list | tuple):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _match_all(list(zip(pattern, value, strict=True)), bound)
    elif pattern is ... or _same(pattern, value):
        yield bound


def _match_variable(pattern: Variable, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if pattern.name in bound:
        if _same(bound[pattern.name], value):
            yield bound
    elif pattern.where is None or pattern.where(value):
        yield {**bound, pattern.name: value}


def _match_call(pattern: Call, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if not isinstance(value, Node) or value.op != "call_function":
        return
    if packet_of(value) not in pattern.packets:
        return
    args = list(all_arguments(value))
    wanted = list(pattern.args)
    if wanted and wanted[-1] is ...:
        wanted.pop()
        args = args[: len(wanted)]
    args += [None] * (len(wanted) - len(args))
    if len(args) > len(wanted):
        if any(not _is_default(value, i) for i in range(len(wanted), len(args))):
            return
        args = args[: len(wanted)]
    bound = {**bound, _INTERIOR: (*bound.get(_INTERIOR, ()), value)}
    if pattern.name:
        bound = {**bound, pattern.name: value}
    orders = itertools.permutations(args[:2]) if pattern.commutative else [tuple(args[:2])]
    for first in orders:
        yield from _match_all(list(zip(wanted, [*first, *args[2:]], strict=True)), bound)


def _match_all(pairs: list[tuple[Any, Any]], bound: Bindings) -> Iterator[Bindings]:
    if not pairs:
        yield bound
        return
    (pattern, value), *rest = pairs
    for extended in _match(pattern, value, bound):
        yield from _match_all(rest, extended)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is not bool and type(b) is not bool and a == b)


def all_arguments(node: Node) -> tuple[Any, ...]:
    """Positional and keyword arguments of a call in schema order, defaults filled in."""
    if not hasattr(node.target, "_schema"):
        return (*node.args, *node.kwargs.values())
    given = len(node.args)
    rest = _parameters(node.target)[given:]
    return (*node.args, *(node.kwargs.get(name, default) for name, default, _ in rest))


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    # Name, default and whether there is one. Schemas are C++ objects and slow to ask.
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None, a.has_default_value())
        for a in target._schema.arguments
    )


def _is_default(node: Node, index: int) -> bool:
    if not hasattr(node.target, "_schema"):
        return False
    _, default, has_default = _parameters(node.target)[index]
    return has_default and _same(all_arguments(node)[index], default)


def argument(node: Node, name: str) -> Any:
    """One argument of a call by its name in the operator's schema, default filled in."""
    for (declared, _, _), value in zip(_parameters(node.target), all_arguments(node), strict=True):
        if declared == name:
            return value
    raise KeyError(name)
