"""Run passes in order on copies, check each, and roll back the one that fails."""

import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fxopt.analysis.samples import Sample
from fxopt.errors import ExpectationError, FxoptError, PassError
from fxopt.ir.legality import check_program
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import PassRecord, Program, has_effect
from fxopt.passes.base import Context, LoweredCall, Pass, PassResult
from fxopt.pipeline.beyond_weights import beyond_weights
from fxopt.pipeline.calibrator import Calibrator
from fxopt.pipeline.verify import Verifier


class Progress(Protocol):
    """Told what is being done; the shell draws a bar, everything else stays silent."""

    def __call__(self, stage: str, detail: str = "") -> None:
        """A stage has begun, or moved to `detail`."""
        ...


def silent(stage: str, detail: str = "") -> None:
    """A progress that shows nothing."""
    del stage, detail


def ignore_replaced(before: Program, after: Program) -> None:
    """Leave what a pass replaced where it is."""
    del before, after


@dataclass(frozen=True)
class Expectation:
    """What a recipe demands of a pass."""

    min_sites: int | None = None
    max_sites: int | None = None
    max_refusals: int | None = None


@dataclass(frozen=True)
class Manager:
    """Applies passes one after the other.

    Attributes:
        verifier: judges each pass.
        samples: makes the calibration batches, for passes that need them.
        expectations: what the recipe demands, by pass name.
        progress: told which pass is running.
        replaced: given the program before and after a pass, at each site and when the pass has
            run, before it is judged: for who wants to hold what it replaced elsewhere.
        lowered_call: a call of a program at (batch, length), once lowered, for passes that time.
    """

    verifier: Verifier
    samples: Callable[[], Sequence[Sample]] = field(default=lambda: ())
    expectations: Mapping[str, Expectation] = field(default_factory=dict[str, Expectation])
    progress: Progress = silent
    replaced: Callable[[Program, Program], None] = ignore_replaced
    lowered_call: LoweredCall | None = None

    def run(self, program: Program, passes: Sequence[Pass]) -> Program:
        """The program after all passes; the one given is not changed.

        Raises:
            PassError: a pass failed, broke its promise, or did not meet its expectation. The
                message names it; nothing of it is kept.
        """
        calibrator = Calibrator(self.samples, self.progress)
        first = len(program.history)
        for index, a_pass in enumerate(passes):
            later = passes[index + 1 :]
            program = self.apply(program, a_pass, later, calibrator, program.history[first:])
        return program

    def apply(
        self,
        program: Program,
        a_pass: Pass,
        later: Sequence[Pass] = (),
        calibrator: Calibrator | None = None,
        earlier: Sequence[PassRecord] = (),
    ) -> Program:
        """The program after one pass, verified and recorded.

        `later` passes of the recipe will need statistics; `earlier` ones of the same name count in
        what is expected of it.
        """
        calibrator = calibrator or Calibrator(self.samples, self.progress)
        self.progress(a_pass.name)
        started = time.perf_counter()
        working = program.clone()
        versions = _versions(program)
        samples = calibrator.batches(program, a_pass)
        prepared = calibrator.prepare(program, a_pass, later, samples)

        def at_site(detail: str) -> None:
            self.progress(a_pass.name, detail)
            self.replaced(program, working)

        context = Context(
            statistics=prepared.statistics,
            samples=samples,
            recorder=calibrator.recorder(program, a_pass, later, samples),
            progress=at_site,
            lowered_call=self.lowered_call,
        )
        with _failing_as(a_pass, "failed"):
            result = a_pass.run(working, context)
        _refuse_in_place_edits(a_pass, program, versions)
        self._finish(a_pass, working, result)
        self._check_expectation(a_pass, result, earlier, later)
        self.replaced(program, working)
        calibrator.follow(working, result, context.recorder, later)

        def repeat(twin: Program) -> tuple[Program, PassResult]:
            outcome = a_pass.run(twin := twin.clone(), context)
            self._finish(a_pass, twin, outcome)
            return twin, outcome

        release_freed_memory(program.byte_count())
        with _failing_as(a_pass, "left a program that cannot be run or judged: it failed"):
            verification = self.verifier.judge(a_pass, program, working, result, repeat)
        record = PassRecord(
            name=a_pass.name,
            options=a_pass.options(),
            sites=result.sites,
            refusals=result.refusals,
            exactness=a_pass.exactness.value,
            verification=verification,
            bytes_before=program.byte_count(),
            bytes_after=working.byte_count(),
            seconds=time.perf_counter() - started,
            notes=(*result.notes, *prepared.notes),
            tables=result.tables,
            calibration=prepared.calibration,
            beyond_weights="" if a_pass.for_any_weights else beyond_weights(program, working),
        )
        working.history.append(record)
        release_freed_memory(program.byte_count())
        return working

    def _finish(self, a_pass: Pass, working: Program, result: PassResult) -> None:
        working.graph.eliminate_dead_code(has_effect)
        working.remove_unused_weights()
        if a_pass.output_level is not None:
            working.level = max(working.level, a_pass.output_level)
        try:
            check_program(working, shapes=self.verifier.mode != "off")
        except FxoptError as error:
            raise PassError(
                f"pass {a_pass.name!r} left an illegal program: {error} {_reasons(result)}The "
                "program is as it was before the pass."
            ) from error
        working.graph_module.recompile()

    def _check_expectation(
        self,
        a_pass: Pass,
        result: PassResult,
        earlier: Sequence[PassRecord],
        later: Sequence[Pass],
    ) -> None:
        """Hold what all passes of a name did together against what the recipe expects of it."""
        alike = [record for record in earlier if record.name == a_pass.name]
        sites = len(result.sites) + sum(len(record.sites) for record in alike)
        refusals = len(result.refusals)  # what one of them refuses may be what another takes
        expected = self.expectations.get(a_pass.name, Expectation())
        last = all(other.name != a_pass.name for other in later)
        problem = None
        if last and expected.min_sites is not None and sites < expected.min_sites:
            problem = f"{sites} sites, at least {expected.min_sites} expected"
        elif expected.max_sites is not None and sites > expected.max_sites:
            problem = f"{sites} sites, at most {expected.max_sites} expected"
        elif expected.max_refusals is not None and refusals > expected.max_refusals:
            problem = f"{refusals} refusals, at most {expected.max_refusals} expected"
        reasons = _reasons(result)
        if problem is not None:
            raise ExpectationError(f"pass {a_pass.name!r}: {problem}. {reasons}")
        if not sites and not a_pass.may_do_nothing:
            warnings.warn(
                f"fxopt: pass {a_pass.name!r} changed nothing. {reasons or 'It found no site.'}",
                stacklevel=4,
            )


@contextlib.contextmanager
def _failing_as(a_pass: Pass, how: str) -> Generator[None]:
    """Whatever is raised inside becomes an error of the pass."""
    try:
        yield
    except FxoptError:
        raise
    except Exception as error:
        raise PassError(
            f"pass {a_pass.name!r} {how} with {type(error).__name__}: {error}. The program is as "
            "it was before the pass."
        ) from error


def _reasons(result: PassResult) -> str:
    """What a pass refused, as a sentence and the space after it; empty if nothing."""
    reasons = "; ".join(f"{refusal.site}: {refusal.reason}" for refusal in result.refusals[:5])
    return f"Refused: {reasons}. " if reasons else ""


def _versions(program: Program) -> dict[str, int]:
    """How often each weight was written to; weights made in inference mode do not count it."""
    weights = program.weights().items()
    return {name: value._version for name, value in weights if not value.is_inference()}


def _refuse_in_place_edits(a_pass: Pass, program: Program, versions: Mapping[str, int]) -> None:
    """Tensors are shared between programs and with the model: a pass must store new ones."""
    for name, version in _versions(program).items():
        if version != versions[name]:
            raise PassError(
                f"pass {a_pass.name!r} wrote into weight {name!r} in place. The program before the "
                "pass, and the model it came from, share that tensor, so both are changed. Store a "
                "new tensor with program.set_weight(name, value) instead, and load the model again."
            )
