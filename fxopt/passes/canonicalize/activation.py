"""Raise written-out activations to `aten.gelu` and `aten.silu`.

    0.5 x (1 + erf(x / sqrt 2))                            =   gelu(x)
    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))      =   gelu(x, approximate="tanh")
    x sigmoid(x)                                           =   silu(x)

The arguments are read as polynomials in x, so every order of the products is found. Quick GELU,
x sigmoid(1.702 x), has no ATen operator and stays as it is.

Shapes: x [...] -> [...].
Exactness: equal over the reals, up to the digits to which a model writes its constants; they must
    agree in float32.
Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, arXiv:1606.08415.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, dtype_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, packet_of, plain_packet
from fxopt.rewrite.rule import Rule

aten = torch.ops.aten
Polynomial = dict[int, float]  # power of x -> coefficient

ERF = {1: math.sqrt(0.5)}
TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
_DEPTH = 8  # products deeper than a written-out activation are not followed
_TOLERANCE = 3e-8  # half a unit in the last place of float32


class RaiseGelu(Rule):
    """Half of x times one plus erf or tanh of a polynomial in x becomes `gelu(x)`."""

    detail = "gelu"

    def pattern(self, op: PatternOperators, left: Variable, right: Variable) -> list[Any]:
        return [op.mul(left, right), op.div(left, right)]

    def condition(self, program: Program, match: Match) -> bool:
        return read_gelu(match.root) is not None

    def rewrite(self, build: Builder, match: Match) -> Node:
        x, approximate = read_gelu(match.root) or (match.root, "")
        return build.call(aten.gelu.default, x, approximate=approximate)


class RaiseSilu(Rule):
    """`x * sigmoid(x)` becomes `silu(x)`."""

    detail = "silu"

    def pattern(self, op: PatternOperators, x: Variable) -> Any:
        return op.mul(x, op.sigmoid(x))

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.silu.default, match.x)


def read_gelu(root: Node) -> tuple[Node, str] | None:
    """The argument and the `approximate` of the GELU that a product computes, or None."""
    for factor in _factors(root)[1]:
        function = _one_plus(factor)
        if function is None:
            continue
        name, expected = ("none", ERF) if packet_of(function) is aten.erf else ("tanh", TANH)
        for x in _operands(function.args[0]):
            coefficient, factors = _factors(root, x)
            half = sorted(factors) == sorted([x, factor]) and coefficient == 0.5
            if half and _near(polynomial(function.args[0], x), expected):
                return (x, name) if dtype_of(x) == dtype_of(root) else None
    return None


def _operands(value: Any, depth: int = _DEPTH) -> list[Node]:
    """Every node that a polynomial expression could be a polynomial in."""
    if not isinstance(value, Node):
        return []
    follow = depth and plain_packet(value) in _ALGEBRA
    inner = [node for arg in value.args for node in _operands(arg, depth - 1)] if follow else []
    return list(dict.fromkeys([value, *inner]))


def _one_plus(node: Node) -> Node | None:
    """The erf or tanh call in `1 + erf(...)`."""
    if plain_packet(node) is not aten.add:
        return None
    calls = [arg for arg in node.args if isinstance(arg, Node)]
    numbers = [arg for arg in node.args if isinstance(arg, int | float)]
    known = len(calls) == 1 and packet_of(calls[0]) in (aten.erf, aten.tanh)
    return calls[0] if known and numbers == [1] else None


def _factors(value: Any, stop: Node | None = None, depth: int = _DEPTH) -> tuple[float, list[Node]]:
    """A product as a number and the nodes that are multiplied; `stop` is not taken apart."""
    if isinstance(value, int | float):
        return float(value), []
    packet = plain_packet(value) if depth and value is not stop else None
    if packet is aten.mul:
        (a, left), (b, right) = (_factors(arg, stop, depth - 1) for arg in value.args)
        return a * b, left + right
    if packet is aten.div and isinstance(value.args[1], int | float):
        a, left = _factors(value.args[0], stop, depth - 1)
        return a / float(value.args[1]), left
    return 1.0, [value]


def polynomial(value: Any, x: Node, depth: int = _DEPTH) -> Polynomial | None:
    """A value as a polynomial in x, or None when it is none."""
    if value is x:
        return {1: 1.0}
    if isinstance(value, int | float):
        return {0: float(value)}
    if depth == 0 or plain_packet(value) not in _ALGEBRA:
        return None
    parts = [polynomial(argument, x, depth - 1) for argument in value.args]
    known = [part for part in parts if part is not None]
    return _ALGEBRA[packet_of(value)](*known) if len(known) == len(parts) == 2 else None


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
    return {power: a.get(power, 0.0) + b.get(power, 0.0) for power in {*a, *b}}


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for p, c in a.items():
        for q, d in b.items():
            result[p + q] = result.get(p + q, 0.0) + c * d
    return result


def _divide(a: Polynomial, b: Polynomial) -> Polynomial | None:
    return _multiply(a, {0: 1 / b[0]}) if set(b) == {0} and b[0] else None


def _power(a: Polynomial, b: Polynomial) -> Polynomial | None:
    if set(b) != {0} or b[0] not in (1, 2, 3):
        return None
    result: Polynomial = {0: 1.0}
    for _ in range(int(b[0])):
        result = _multiply(result, a)
    return result


def _near(found: Polynomial | None, expected: Polynomial) -> bool:
    if found is None:
        return False
    nonzero = {power: value for power, value in found.items() if value}
    return set(nonzero) == set(expected) and all(
        math.isclose(nonzero[power], expected[power], rel_tol=_TOLERANCE) for power in expected
    )


_ALGEBRA: dict[Any, Callable[[Polynomial, Polynomial], Polynomial | None]] = {
    aten.add: _add,
    aten.mul: _multiply,
    aten.div: _divide,
    aten.pow: _power,
}
RULES = (RaiseGelu(), RaiseSilu())
