"""What a pass is: a frozen dataclass whose fields are its recipe options, and one `run`."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import Recorder
from fxopt.analysis.carrying import ChannelChange
from fxopt.analysis.samples import Sample
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, Table

LoweredCall = Callable[[Program, tuple[int, int]], Callable[[], Any]]
StateChange = Callable[[Tensor], Tensor | Sequence[Tensor]]


class Exactness(enum.Enum):
    """What a pass promises about the function it leaves behind."""

    EQUIVALENT = "equivalent"  # equal over the reals; verified in float64
    APPROXIMATE = "approximate"  # the cost is measured and reported


@dataclass(frozen=True)
class PassResult:
    """Where a pass worked, and where it did not and why."""

    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    # How a cache in the old basis is brought to the new one, by the name of the graph input; what
    # was one tensor may become several. A cache is state: its basis may change as long as what
    # goes in fits what comes out.
    state: Mapping[str, StateChange] = field(default_factory=dict[str, StateChange])
    # How many old tokens a call must read before it shows what the pass did; 0: none.
    past: int = 0
    tables: tuple[Table, ...] = ()
    # How what linears read has changed, by name of the node; what is not named kept its values, up
    # to rounding. None: not known, and statistics for later passes are gathered anew.
    activations: Mapping[str, ChannelChange] | None = None


@dataclass(frozen=True)
class Calibration:
    """A statistic of activations that a pass needs gathered before it runs.

    Attributes:
        statistic: "minimum", "maximum", "mean", "mean_abs", "rows", "tokens", "batches" or
            "histogram"; "samples" is the data itself, for a pass that watches the program while it
            rewrites it.
        rows: for "rows": how many tokens are kept of each activation.
    """

    statistic: str
    rows: int = 0


@dataclass
class Context:
    """What the manager gives a pass: statistics of calibration data by node name, or the data."""

    statistics: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict[str, Mapping[str, Any]]
    )
    samples: Sequence[Sample] = ()
    progress: Callable[[str], None] = lambda _: None
    # Statistics that later passes need, for a pass that runs the program over all samples.
    recorder: Recorder | None = None
    # One call of a program, lowered as it will be, at (batch, length): for who wants to time it.
    lowered_call: LoweredCall | None = None


class Pass:
    """Base of all passes.

    Subclasses are frozen dataclasses. The class variables state the contract; `run` changes the
    program it is given, which is a copy that the manager throws away when the pass fails.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = Exactness.EQUIVALENT
    input_level: ClassVar[Level] = Level.CAPTURED
    output_level: ClassVar[Level | None] = None  # None: the level stays as it is
    after: ClassVar[tuple[str, ...]] = ()  # passes that, if present, must come earlier
    before: ClassVar[tuple[str, ...]] = ()  # passes that, if present, must come later
    followed_by: ClassVar[tuple[str, ...]] = ()  # one of these must come later
    may_do_nothing: ClassVar[bool] = False  # True: no warning when there is no site
    # True: it rewrites the graph whatever the weights are, so the model can still take them.
    for_any_weights: ClassVar[bool] = False

    def needs(self) -> tuple[Calibration, ...]:
        """The calibration statistics that `run` will read from its context."""
        return ()

    def observed(self, program: Program) -> list[Node]:
        """The nodes whose outputs calibration watches, for a pass that needs any."""
        return program.nodes()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options as plain data, for the report and the stored recipe."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


PassClass = TypeVar("PassClass", bound=type[Pass])
_REGISTRY: dict[str, type[Pass]] = {}


def register(name: str) -> Callable[[PassClass], PassClass]:
    """Make a pass known to recipes under `name`.

    Raises:
        RecipeError: the name is taken.
    """

    def decorate(cls: PassClass) -> PassClass:
        if name in _REGISTRY:
            raise RecipeError(f"two passes are called {name!r}; rename one of them.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def registered_passes() -> dict[str, type[Pass]]:
    """Every known pass by name."""
    return dict(sorted(_REGISTRY.items()))
