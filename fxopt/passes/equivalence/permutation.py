"""What all passes share that put the coordinates of hidden axes in another order."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.op_rules.attention import WHOLE_GROUP
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import Edit, Symmetry, symmetries
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, Refusal
from fxopt.passes.base import Context, Exactness, Pass, PassResult
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.order import choose_order
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Permutation(Pass):
    """Base of the permutation passes; a subclass says which axes it is about.

    Attributes:
        by: "range" sorts by the reach of the weights that read the axis, "search" goes on by
            exchanges, "random" shuffles, "given" takes `orders`.
        group: how many consecutive coordinates will share a scale.
        seed: for "random" and "search".
        orders: orders by the path of the module that first writes the axis, for "given".
    """

    by: Literal["range", "search", "random", "given"] = "range"
    group: int = 32
    seed: int = 0
    orders: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    role: ClassVar[str] = ""
    units: ClassVar[tuple[Unit, ...]] = (Unit.CHANNEL,)
    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize",)
    before = ("quantize",)

    def __post_init__(self) -> None:
        if self.group < 1:
            raise RecipeError(f"group {self.group} is not a positive number.")
        if (self.by == "given") != bool(self.orders):
            raise RecipeError("orders go with by='given', and by='given' needs orders.")

    def restored(self, program: Program) -> frozenset[str]:
        """Outputs that are brought back to their own order."""
        del program
        return frozenset()

    def run(self, program: Program, context: Context) -> PassResult:
        """Put every axis of the role in its order."""
        changes = Changes(program)
        refusals: dict[tuple[str, str], Refusal] = {}
        known: set[str] = set()
        moved: set[str] = set()  # weights whose groups changed place as a whole
        # With one query head per kv head, a head is its own group.
        seen: set[frozenset[Any]] = set()
        for unit in self.units:
            found = symmetries(program, Kind.PERMUTE, unit, self.restored(program))
            for symmetry in found.of_role(self.role):
                places = frozenset(edit.place for edit in symmetry.edits)
                if places in seen:
                    continue
                seen.add(places)
                known.add(symmetry.path)
                context.progress(symmetry.path)
                if self._permute(program, changes, symmetry) and unit is Unit.GROUP:
                    moved |= {edit.name for edit in symmetry.weights}
            refusals |= {(r.site, r.reason): r for r in found.refusals}
        self._check_given(known)
        left = [r for r in refusals.values() if not _moved_after_all(r, moved)]
        if not (changes.sites or changes.refusals or left):
            left = symmetries(program, Kind.PERMUTE, self.units[0]).refused_axes()
        return changes.result(left)

    def _permute(self, program: Program, changes: Changes, symmetry: Symmetry) -> bool:
        given = self.orders.get(symmetry.path)
        if self.by == "given" and given is None:
            changes.refuse(symmetry.path, "no order was given for it")
            return False
        order = choose_order(program, symmetry, self.by, self.group, self.seed, given)
        if torch.equal(order, torch.arange(symmetry.size).expand_as(order)):
            return False
        blocks = f"{symmetry.blocks} blocks of " if symmetry.blocks > 1 else ""
        changes.apply(symmetry, order, f"{blocks}{symmetry.size} {self.role} coordinates reordered")
        reorder_graph(program, symmetry.edits, order, self.name)
        return True

    def _check_given(self, known: Iterable[str]) -> None:
        unknown = sorted(set(self.orders) - set(known))
        if unknown:
            raise RecipeError(
                f"{self.name}: there is no {self.role} axis written by {unknown[0]!r}; there are "
                f"{', '.join(sorted(known)) or 'none'}."
            )


def _moved_after_all(refusal: Refusal, moved: set[str]) -> bool:
    """Whether a kv head that did not move alone moved with its group."""
    return refusal.reason.startswith(WHOLE_GROUP) and not moved.isdisjoint(refusal.site.split(", "))


def reorder_graph(program: Program, edits: Iterable[Edit], order: Tensor, made_by: str) -> None:
    """Put indices where operands and outputs follow an order of the graph's own."""
    for edit in edits:
        if edit.role == "operand":
            node = next(n for n in program.graph.nodes if n.name == edit.name)
            build = Builder(program, node, made_by)
            table: Any = node.args[edit.operand]
            node.update_arg(edit.operand, _reordered_table(build, table, edit, order))
        elif edit.role == "output":
            _restore(program, edit, order, made_by)


def _reordered_table(build: Builder, table: Node, edit: Edit, order: Tensor) -> Node:
    """A table cos or sin [B, 1 or H, S, R] with its heads, its last axis, or both in another order.

    Heads may stand behind the tokens; leading axes of length one may be missing.
    """
    while len(table.meta["val"].shape) < 4:
        table = build.call(aten.unsqueeze.default, table, 0)
    turned: Any = build.before.args[0]
    width = table.meta["val"].shape[3]
    lengths = [*turned.meta["val"].shape[:3], width]
    positions = torch.from_numpy(edit.positions)
    moved = positions.gather(1, order[:, :, None].expand(positions.shape))
    index = torch.arange(math.prod(lengths[axis] for axis in edit.axes))
    index[positions.flatten()] = moved.flatten()
    axis = edit.axes[0]
    if len(edit.axes) == 1:
        held = _stored(build, edit, index)
        return build.call(aten.index_select.default, table, axis, held)
    index = index.reshape(-1, width) % width
    if bool((index == index[:1]).all()) and table.meta["val"].shape[axis] == 1:
        return build.call(aten.index_select.default, table, 3, _stored(build, edit, index[0]))
    heads = table.meta["val"].shape[axis]
    chosen = torch.arange(len(index))[:, None] if heads > 1 else torch.zeros(len(index), 1).long()
    held = [None, None, _stored(build, edit, chosen, "head"), _stored(build, edit, index)]
    if axis == 2:
        return build.call(aten.index.Tensor, table, held)
    by_token = build.call(aten.transpose.int, table, axis, 2)
    picked = build.call(aten.index.Tensor, by_token, held)
    return build.call(aten.transpose.int, picked, axis, 2)


def _stored(build: Builder, edit: Edit, index: Tensor, what: str = "order") -> Node:
    path = build.before.meta.get("module_path", "")
    return build.new_weight(f"{path}.{edit.name}_{edit.operand}_{what}".lstrip("."), index)


def _restore(program: Program, edit: Edit, order: Tensor, made_by: str) -> None:
    """An output in the order that the caller knows."""
    output = program.graph.output_node()
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    index = next(i for i, s in enumerate(program.signature.outputs) if s.name == edit.name)
    positions = torch.from_numpy(edit.positions)
    moved = positions.gather(1, order[:, :, None].expand(positions.shape))
    back = torch.arange(int(positions.max()) + 1)
    back[moved.flatten()] = positions.flatten()
    build = Builder(program, output, made_by)
    held = build.new_weight(f"{edit.name}_order", back)
    results[index] = build.call(aten.index_select.default, results[index], edit.axes[0], held)
    output.args = (tuple(results),)
