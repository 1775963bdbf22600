"""Linears that are stored alike: those that read one activation or one weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.ir.operators.packing import packed_length
from fxopt.ir.program import Program, Refusal, module_path
from fxopt.passes.quantization.assignment import Matrix
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.sites import CHOICE, not_selected, unquantizable

aten = torch.ops.aten
_SCALE_BYTES = 4  # scales are float32


@dataclass
class LinearGroup:
    """Linears between which no choice can differ, and the weights that they read."""

    linears: list[Node] = field(default_factory=list[Node])
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    @property
    def elements(self) -> int:
        """How many numbers the weights hold."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def kind(self) -> tuple[tuple[int, ...], ...]:
        """Groups of one kind take the same time."""
        return tuple(self.shapes.values())

    @property
    def paths(self) -> list[str]:
        """The module paths of the linears."""
        return [module_path(linear) for linear in self.linears]

    def byte_count(self, program: Program, choice: Choice) -> int:
        """What the weights take by a choice: codes, scales and zero points."""
        if choice.weights is None:
            return sum(program.weight(name).nbytes for name in self.shapes)
        return sum(stored_bytes(shape, choice.weights) for shape in self.shapes.values())


def stored_bytes(shape: tuple[int, ...], options: WeightOptions) -> int:
    """What a weight [out, in] takes once it is stored."""
    rows, columns = shape
    height, width = (
        length if size == -1 else size for length, size in zip(shape, options.block, strict=True)
    )
    blocks = (rows // height) * (columns // width)
    codes = rows * packed_length(columns, options.format.bits)
    return codes + blocks * (_SCALE_BYTES + (0 if options.symmetric else 1))


def byte_prices(
    program: Program, groups: Sequence[LinearGroup], choices: Sequence[Choice]
) -> Matrix:
    """The bytes of each group by each choice, [groups, choices]."""
    return np.array([[float(g.byte_count(program, c)) for c in choices] for g in groups])


def linear_groups(
    program: Program, choices: Sequence[Choice], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[LinearGroup], list[Refusal]]:
    """The groups in graph order, and the linears that belong to none."""
    groups: list[LinearGroup] = []
    by_source: dict[Any, LinearGroup] = {}
    refusals: list[Refusal] = []
    for node in program.nodes(aten.linear.default):
        reason = _impossible(program, node, choices, include, exclude)
        if reason is not None:
            refusals.append(Refusal(module_path(node) or node.name, reason))
            continue
        weight: Any = node.args[1]
        name = str(weight.target)
        # A tied weight brings together what reads different activations.
        group = by_source.get(name) or by_source.get(node.args[0])
        if group is None:
            groups.append(group := LinearGroup())
        by_source[name] = group
        by_source.setdefault(node.args[0], group)
        group.linears.append(node)
        group.shapes[name] = tuple(program.weight(name).shape)
    return groups, refusals


def _impossible(
    program: Program,
    node: Node,
    choices: Sequence[Choice],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    reason = not_selected(node, include, exclude) or unquantizable(program, node)
    if reason is not None:
        return reason
    if CHOICE in node.meta:
        return "its bits are allocated already"
    weight: Any = node.args[1]
    other = next((user for user in weight.users if user.target is not aten.linear.default), None)
    if other is not None:
        return f"its weight is also read by {other.target}; give both to a quantize of their own"
    shape = tuple(program.weight(str(weight.target)).shape)
    return next((misfit for c in choices if (misfit := c.misfit(shape)) is not None), None)
