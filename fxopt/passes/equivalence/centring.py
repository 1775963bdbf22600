"""Subtract means from all that writes a stream, and drop the mean from its layer norms.

    x <- x - mean(x),   then   layer_norm(x) g + b = rms_norm(x) g + b

The mean of a stream reaches nothing when only layer norms read it, so every writer may be centred:
rows of W over its outputs, its bias, the columns of embeddings.
"""

from typing import Any

import torch
from torch.fx import Node

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Symmetry, symmetries
from fxopt.ir.program import Program, module_path, shape_of
from fxopt.passes.equivalence.changes import Changes
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten


def centre(program: Program, changes: Changes, made_by: str) -> None:
    """Centre every stream that only layer norms read; say of each other layer norm why not."""
    found = symmetries(program, Kind.CENTRE)
    for symmetry in found:
        readers = _norms(program, symmetry)
        if not readers:
            continue
        changes.apply(
            symmetry, None, f"{len(readers)} layer norms become rms norms, writers centred"
        )
        for node in readers:
            _replace(program, node, made_by)
    for node in program.nodes(aten.layer_norm.default):
        reason = (
            found.reason_of_value(node.args[0]) or "one of the norms reads a part of the stream"
        )
        changes.refuse(module_path(node) or node.name, f"its mean has to stay: {reason}")


def _norms(program: Program, symmetry: Symmetry) -> list[Node]:
    """The layer norms that read the stream and nothing else; none if one reads only a part."""
    read = [edit for edit in symmetry.edits if edit.role == "operand"]
    nodes = [node for node in program.nodes() if node.name in {edit.name for edit in read}]
    whole = all(edit.positions.size == symmetry.size for edit in read) and all(
        shape_of(node)[-1] == symmetry.size for node in nodes
    )
    return nodes if whole else []


def _replace(program: Program, node: Node, made_by: str) -> None:
    defaults = [None, None, None, None, 1e-5]
    x, shape, gain, bias, eps = [*node.args, *defaults[len(node.args) :]][:5]
    build = Builder(program, node, made_by)
    normed: Any = build.call(aten.rms_norm.default, x, shape, gain, eps)
    if bias is not None:
        normed = build.call(aten.add.Tensor, normed, bias)
    node.replace_all_uses_with(normed)
    program.graph.erase_node(node)
