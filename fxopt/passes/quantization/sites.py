"""Where quantization can act: what a recipe selects of the weights, and what forbids it."""

import fnmatch
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxopt.analysis.heads import HeadAxis, head_axes
from fxopt.ir.program import Program, Refusal, dtype_of, module_path
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.weights import kind_of, weight_indices, weight_node

aten = torch.ops.aten
# Under this key of a node's meta, `allocate-bits` leaves its choice for a linear.
CHOICE = "quantization_choice"
# Under this one, `mark_heads` leaves where heads stand in its weight.
HEADS = "heads_of_attention"
# Weights with fewer elements are not worth a line of the report.
_LARGE = 4096


def not_selected(node: Node, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Which pattern of the recipe leaves a node out, or None.

    Patterns match the module path of the node and that of the weight it reads, which differ where
    weights are tied.
    """
    names = [module_path(node)]
    for index in weight_indices(node):
        weight = weight_node(node, index)
        if weight is not None:
            names.append(str(weight.target).rpartition(".")[0])
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in include):
        return f"not selected by include {list(include)}"
    for pattern in exclude:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"excluded by {pattern!r}"
    return None


def allocated(node: Node) -> Choice | None:
    """How a linear is to be stored where `allocate-bits` chose."""
    return node.meta.get(CHOICE)


def weight_options(node: Node, asked: WeightOptions | None) -> WeightOptions | None:
    """How the weight of a linear is stored: as allocated, else as the pass was asked to.

    For granularity "head" `mark_heads` must have been called.
    """
    choice = allocated(node)
    options = asked if asked is None or choice is None else choice.weights
    heads: HeadAxis | None = node.meta.get(HEADS)
    if options is None or options.granularity != "head" or heads is None:
        return options
    return options.by_head(heads.axis, heads.size)


def mark_heads(program: Program, asked: WeightOptions | None) -> None:
    """Note at each linear where its heads stand, if blocks of heads were asked for.

    What lies outside of attention is divided into groups of rows of the size that most heads have.
    """
    if asked is None or asked.granularity != "head":
        return
    known = head_axes(program)
    sizes = Counter(heads.size for heads in known.values())
    usual = [HeadAxis(0, size) for size, _ in sizes.most_common(1)]
    for node in program.nodes():
        if kind_of(node) not in ("linear", "experts"):
            continue
        weight = weight_node(node, 1) if kind_of(node) == "linear" else None
        heads = None if weight is None else known.get(str(weight.target))
        node.meta[HEADS] = heads or next(iter(usual), None)


def unquantizable(program: Program, node: Node, options: WeightOptions | None = None) -> str | None:
    """Why the weight of a linear or embedding, or those of experts, cannot be quantized, or None.

    Without `options` the weight is not divided into blocks.
    """
    reasons = (_misfit(program, node, index, options) for index in weight_indices(node))
    return next((reason for reason in reasons if reason is not None), None)


def _misfit(program: Program, node: Node, index: int, options: WeightOptions | None) -> str | None:
    weight = weight_node(node, index)
    if weight is None:
        source: Any = node.args[index]
        if is_stored_weight(source):
            return "already quantized"
        return "the weight is computed in the graph, not stored"
    value = program.weight(str(weight.target))
    axes = 3 if kind_of(node) == "experts" else 2
    if value.dim() != axes:
        return f"the weight has shape {list(value.shape)}; {axes} axes are needed"
    if not value.is_floating_point():
        return f"the weight is {value.dtype}"
    return None if options is None else options.misfit(tuple(value.shape[-2:]))


def other_weights(program: Program) -> list[Refusal]:
    """Large weights that no rule takes, so that the report shows what stayed."""
    refusals: list[Refusal] = []
    for node in program.graph.nodes:
        dtype = dtype_of(node)
        if node.op != "get_attr" or not node.users or dtype is None or not dtype.is_floating_point:
            continue
        value = program.weight(str(node.target))
        known = any(kind_of(user) is not None or is_stored_weight(user) for user in node.users)
        if value.dim() >= 2 and value.numel() >= _LARGE and not known:
            users = ", ".join(sorted({str(user.target) for user in node.users}))
            reason = f"a weight of shape {list(value.shape)} read by {users}"
            refusals.append(Refusal(str(node.target), reason + " has no quantized form yet"))
    return refusals
