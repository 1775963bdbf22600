"""Raise every product with a weight matrix to `aten.linear` on the leading dimensions it has.

    x @ W + b               =   linear(x, W.T, b)
    (x.reshape(n, k) @ W.T).reshape(..., m)   =   linear(x.reshape(..., k), W)

Shapes: x [..., k]; W [m, k] as linear wants it, stored [k, m] in GPT-2's Conv1D; b [m].
Exactness: equal over the reals.
"""

# ruff: noqa: D102 - a rule's methods are documented by Rule

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.inference import fake_mode
from fxopt.ir.program import Program, Refusal, dtype_of, module_path, shape_of
from fxopt.passes.canonicalize.views import permute
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.pattern import Match, PatternOperators, Variable, argument
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import same_size

aten = torch.ops.aten


class RaiseMatmul(Rule):
    """`matmul(x, W)` becomes `linear(x, t(W))` for a weight W."""

    detail = "linear"

    def pattern(self, op: PatternOperators, x: Variable, weight: Variable) -> list[Any]:
        return [op.matmul(x, weight), op.mm(x, weight)]

    def condition(self, program: Program, match: Match) -> bool:
        return is_weight_matrix(match.weight)

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.linear.default, match.x, permute(build, match.weight, [1, 0]))


class RaiseAddmm(Rule):
    """`addmm(b, x, W)` becomes `linear(x, t(W), b)`."""

    detail = "linear"

    def pattern(self, op: PatternOperators, bias: Variable, x: Variable, weight: Variable) -> Any:
        return op.addmm(bias, x, weight, ...)

    def condition(self, program: Program, match: Match) -> bool:
        return is_weight_matrix(match.weight)

    def check(self, program: Program, match: Match) -> str | None:
        if argument(match.root, "beta") != 1 or argument(match.root, "alpha") != 1:
            return "addmm scales its terms by alpha or beta, which linear cannot"
        if len(shape_of(match.bias)) != 1:
            return "the bias of addmm is not one vector"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        weight = permute(build, match.weight, [1, 0])
        bias = match.bias
        if not same_size(shape_of(bias)[0], shape_of(weight)[0]):  # addmm spreads a single number
            bias = build.call(aten.expand.default, bias, [build.size(weight, 0)])
        return build.call(aten.linear.default, match.x, weight, bias)


class FoldBias(Rule):
    """`linear(x, W) + b` becomes `linear(x, W, b)`."""

    def pattern(self, op: PatternOperators, x: Variable, weight: Variable, bias: Variable) -> Any:
        return op.add(op.named("linear", op.linear(x, weight, None)), bias)

    def condition(self, program: Program, match: Match) -> bool:
        out = shape_of(match.linear)[-1]
        vector = program.constant(match.bias) is not None and len(shape_of(match.bias)) == 1
        return vector and same_size(shape_of(match.bias)[0], out)

    def check(self, program: Program, match: Match) -> str | None:
        if len(match.linear.users) > 1:
            return "the product without its bias is read elsewhere too"
        if len(match.bias.users) > 1:
            return f"the vector {match.bias.target} is added in several places"
        if dtype_of(match.bias) != dtype_of(match.weight):
            return "the bias has another dtype than the weight"
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        return build.call(aten.linear.default, match.x, match.weight, match.bias)


class KeepLeadingDimensions(Rule):
    """`reshape(linear(reshape(x), W, b))` becomes `linear(reshape(x), W, b)`."""

    def pattern(self, op: PatternOperators, x: Variable, weight: Variable, bias: Variable) -> Any:
        linear = op.named("linear", op.linear(op.reshape(x, ...), weight, bias))
        return op.reshape(linear, op.variable("sizes"))

    def condition(self, program: Program, match: Match) -> bool:
        same_last = same_size(shape_of(match.root)[-1], shape_of(match.linear)[-1])
        return same_last and len(match.linear.users) == 1 and len(shape_of(match.root)) > 1

    def rewrite(self, build: Builder, match: Match) -> Node:
        sizes = [*match.sizes[:-1], build.size(match.weight, 1)]
        x = build.call(aten.reshape.default, match.x, sizes)
        return build.call(aten.linear.default, x, match.weight, match.bias)


def is_weight_matrix(node: Any) -> bool:
    """Whether a node is a stored matrix, perhaps transposed or cast."""
    while isinstance(node, Node) and node.target in (aten.t.default, aten.to.dtype):
        node = node.all_input_nodes[0]
    return isinstance(node, Node) and node.op == "get_attr" and len(shape_of(node)) == 2


def store_transposed(program: Program) -> tuple[int, list[Refusal]]:
    """Store weights that linear reads transposed the way linear reads them.

    The name stays; `program.layouts` says that the tensor under it is transposed.

    Returns:
        how many weights were stored anew, and the refusals.
    """
    stored = 0
    refusals: list[Refusal] = []
    for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
        transposed = [user for user in node.users if user.target is aten.t.default]
        if not any(_is_linear_weight(user, t) for t in transposed for user in t.users):
            continue
        if len(transposed) != len(node.users):
            reason = (
                f"weight {node.target} is also read untransposed (tied weights), so it stays as "
                "it is and is transposed when the model runs"
            )
            refusals.append(Refusal(f"{module_path(transposed[0])} [{node.name}]", reason))
            continue
        _store(program, node, transposed)
        stored += 1
    return stored, refusals


def _is_linear_weight(user: Node, weight: Node) -> bool:
    return user.target is aten.linear.default and user.args[1] is weight


def _store(program: Program, node: Node, transposed: list[Node]) -> None:
    name = str(node.target)
    program.set_weight(name, program.weight(name).t().contiguous())
    mode = fake_mode(program)
    node.meta["val"] = mode.from_tensor(program.weight(name), static_shapes=True)
    if program.layouts.pop(name, None) is None:
        program.layouts[name] = "transposed"
    for reader in transposed:
        reader.replace_all_uses_with(node)
    erase_dead(transposed)


RULES = (RaiseMatmul(), RaiseAddmm(), FoldBias(), KeepLeadingDimensions())
