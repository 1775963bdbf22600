"""What a pass over symmetries has applied so far."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.carrying import ChannelChange
from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Edit, Symmetry
from fxopt.analysis.transform import StateChange, apply, changed, state_changes
from fxopt.ir.program import Program, Refusal, Site
from fxopt.passes.base import PassResult

aten = torch.ops.aten
_CACHE_NOTE = "the basis of the cache changes: caches made by the original no longer fit"


class Changes:
    """Applies transforms to a program and keeps the record that becomes the pass's result."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.state: dict[str, StateChange] = {}
        # How what linears read has changed; None where a change was not one of channels.
        self.activations: dict[str, ChannelChange] | None = {}

    def apply(self, symmetry: Symmetry, transform: Tensor | None, detail: str) -> None:
        """Change the basis of one hidden axis; caches that hold it follow."""
        apply(self.program, symmetry, transform)
        for name, change in state_changes(symmetry, transform).items():
            self.follow(name, change)
        self.turn_inputs(symmetry.weights, symmetry.kind, transform)
        names = ", ".join(edit.name for edit in symmetry.weights)
        self.sites.append(Site(symmetry.path, f"{detail}: {names}"))

    def turn_inputs(self, edits: Iterable[Edit], kind: Kind, transform: Tensor | None) -> None:
        """Where columns of weights were edited, what their linears read has changed inversely."""
        sources = _sources(self.program)
        turned: set[tuple[str, bytes]] = set()
        for edit in edits:
            for source, whole in sources.get(edit.name, ()) if edit.axes != (0,) else ():
                once = (source.name, edit.positions.tobytes())
                if once not in turned:
                    change = _of_input(edit, kind, transform) if whole else None
                    self._turn(ChannelChange(source.name, change, kind is Kind.PERMUTE))
                turned.add(once)

    def _turn(self, change: ChannelChange) -> None:
        if self.activations is not None:
            earlier = self.activations.get(change.source)
            self.activations[change.source] = change if earlier is None else earlier.then(change)

    def follow(self, name: str, change: StateChange) -> None:
        """A cache input changes once more."""
        earlier = self.state.get(name)
        self.state[name] = change if earlier is None else _then(earlier, change)

    def refuse(self, site: str, reason: str) -> None:
        """Leave a place alone, and say why."""
        self.refusals.append(Refusal(site, reason))

    def result(self, refusals: Iterable[Refusal] = ()) -> PassResult:
        """The pass's result."""
        notes = (_CACHE_NOTE,) if self.state else ()
        return PassResult(
            tuple(self.sites),
            (*self.refusals, *refusals),
            notes,
            dict(self.state),
            activations=self.activations,
        )


def _sources(program: Program) -> dict[str, list[tuple[Node, bool]]]:
    """By weight, what its linears read, and whether its columns are theirs one by one."""
    found: dict[str, list[tuple[Node, bool]]] = {}
    for node in program.nodes(aten.linear.default):
        source, weight = node.args[0], node.args[1]
        whole = True
        while isinstance(weight, Node) and weight.op != "get_attr" and weight.all_input_nodes:
            # A slice of rows still has all columns.
            rows = weight.target is aten.slice.Tensor and weight.args[1:2] in ((), (0,))
            whole, weight = whole and rows, weight.all_input_nodes[0]
        if isinstance(source, Node) and isinstance(weight, Node):
            found.setdefault(str(weight.target), []).append((source, whole))
    return found


def _of_input(
    edit: Edit, kind: Kind, transform: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    """What the values [..., in] that meet an edited weight [out, in] become."""
    if edit.axes != (1,) or kind not in (Kind.SCALE, Kind.SIGN, Kind.PERMUTE):
        return None

    def turn(x: Tensor) -> Tensor:
        return changed(x, replace(edit.turned(), axes=(x.dim() - 1,)), kind, transform)

    return turn


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> StateChange:
    return lambda value: second(first(value))
