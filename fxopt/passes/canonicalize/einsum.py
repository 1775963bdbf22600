"""Write a contraction of two tensors over one index as `aten.matmul`.

    einsum("bhsd,bhtd->bhst", q, k)   =   q @ k^T

Shapes: any with one contracted index and one index that each operand has alone; every other
    index runs over the batch.
Exactness: equal over the reals.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.passes.canonicalize.views import permute
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable
from fxopt.rewrite.rule import Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """`left, right -> out` as [batch, row, inner] @ [batch, inner, column]."""

    left: str
    right: str
    out: str
    batch: str
    row: str
    inner: str
    column: str


class WriteEinsumAsMatmul(Rule):
    """`einsum(equation, [a, b])` becomes `matmul` of permuted operands."""

    def pattern(self, op: PatternOperators, equation: Variable, a: Variable, b: Variable) -> Any:
        return op.einsum(equation, [a, b], ...)

    def condition(self, program: Program, match: Match) -> bool:
        return read_equation(match.equation) is not None

    def rewrite(self, build: Builder, match: Match) -> Node:
        c = read_equation(match.equation)
        assert c is not None  # noqa: S101 - `condition` looked
        a = permute(build, match.a, _order(c.left, c.batch + c.row + c.inner))
        b = permute(build, match.b, _order(c.right, c.batch + c.inner + c.column))
        product = build.call(aten.matmul.default, a, b)
        return permute(build, product, _order(c.batch + c.row + c.column, c.out))


def read_equation(equation: str) -> Contraction | None:
    """An einsum equation as a batched matrix product, or None if it is none."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    if not arrow or not comma or not (left + right + out).isalpha():
        return None
    if any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    batch = "".join(index for index in out if index in left and index in right)
    inner = "".join(index for index in left if index in right and index not in out)
    row = "".join(index for index in left if index not in right)
    column = "".join(index for index in right if index not in left)
    single = len(inner) == len(row) == len(column) == 1
    complete = set(out) == set(batch + row + column)
    return Contraction(left, right, out, batch, row, inner, column) if single and complete else None


def _order(before: str, after: str) -> list[int]:
    return [before.index(index) for index in after]


RULES = (WriteEinsumAsMatmul(),)
