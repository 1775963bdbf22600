"""What a pass over symmetries has applied so far."""

from collections.abc import Callable, Iterable

from torch import Tensor

from fxopt.analysis.symmetry import Symmetry
from fxopt.analysis.transform import StateChange, apply, state_changes
from fxopt.ir.program import Program, Refusal, Site
from fxopt.passes.base import PassResult

_CACHE_NOTE = "the basis of the cache changes: caches made by the original no longer fit"


class Changes:
    """Applies transforms to a program and keeps the record that becomes the pass's result."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.state: dict[str, StateChange] = {}

    def apply(self, symmetry: Symmetry, transform: Tensor | None, detail: str) -> None:
        """Change the basis of one hidden axis; caches that hold it follow."""
        apply(self.program, symmetry, transform)
        for name, change in state_changes(symmetry, transform).items():
            self.follow(name, change)
        names = ", ".join(edit.name for edit in symmetry.weights)
        self.sites.append(Site(symmetry.path, f"{detail}: {names}"))

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
        return PassResult(tuple(self.sites), (*self.refusals, *refusals), notes, dict(self.state))


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> StateChange:
    return lambda value: second(first(value))
