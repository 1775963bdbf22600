"""Calibration for the passes of a recipe: the data is read once for all of them where it can be.

At the first pass that needs statistics, those that all later passes need are gathered too, in one
streaming run. Each pass says how it changed what linears read; what is still known is carried over
it, and only what is not is gathered again. A pass that runs the program over the data by itself
records on its way what later passes need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fxopt.analysis.calibration import Recorder, linear_inputs, record
from fxopt.analysis.carrying import Known, derivations
from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program
from fxopt.passes.base import Calibration, Pass, PassResult
from fxopt.pipeline.coverage import gaps
from fxopt.pipeline.state_basis import fitted

# A pass that watches the program by itself asks for the data and not for a statistic of it.
_DATA = "samples"
_ENDS = {"minimum", "maximum"}


class Prepared(NamedTuple):
    """Statistics for a pass, and for the report whether data was read and what it did not show."""

    statistics: Mapping[str, Mapping[str, Any]]
    calibration: str
    notes: tuple[str, ...] = ()


@dataclass
class Calibrator:
    """What is known of the activations of a program while passes rewrite it.

    Attributes:
        samples: makes the calibration batches.
        progress: told of a pass which batch is being read.
        known: what was found so far.
    """

    samples: Callable[[], Sequence[Sample]]
    progress: Callable[[str, str], None]
    known: Known = field(default_factory=Known)

    def batches(self, program: Program, a_pass: Pass) -> Sequence[Sample]:
        """The calibration batches that a pass asks for, with caches that the program takes."""
        if not a_pass.needs():
            return ()
        samples = self.samples()
        if not samples:
            raise CalibrationError(
                f"pass {a_pass.name!r} needs calibration data and there is none. Pass "
                "calibration=[...]: inputs like those of the model, or texts where there is a "
                "tokenizer."
            )
        return [replace(sample, inputs=fitted(program, sample.inputs)) for sample in samples]

    def prepare(
        self, program: Program, a_pass: Pass, later: Sequence[Pass], samples: Sequence[Sample]
    ) -> "Prepared":
        """The statistics that a pass needs, and how they were come by."""
        needs = _statistics([a_pass])
        if not needs:
            return Prepared({}, "read" if a_pass.needs() else "")
        wanted = {node.name for node in a_pass.observed(program)}
        covered = (self.known.covered.get(need.statistic, set()) for need in needs)
        if all(wanted <= names for names in covered) and self.known.rows >= _rows(needs):
            return Prepared(self.known.statistics, "carried over")
        takers = [one for one in (a_pass, *later) if _statistics([one])]
        asked = _statistics(takers)
        nodes = {node.name: node for one in takers for node in one.observed(program)}
        recorder = Recorder(program, nodes.values(), samples, _rows(asked), _histogram(asked))

        def at_batch(count: int) -> None:
            self.progress(a_pass.name, f"calibration batch {count}/{len(samples)}")

        record(program, recorder, samples, at_batch)
        self.known = _found(recorder)
        found = self.known.statistics
        return Prepared(found, "read", gaps(nodes.values(), found))

    def recorder(
        self, program: Program, a_pass: Pass, later: Sequence[Pass], samples: Sequence[Sample]
    ) -> Recorder | None:
        """For a pass that reads the data by itself: what takes in what later passes need."""
        asked = _statistics(later)
        if not asked or all(need.statistic != _DATA for need in a_pass.needs()):
            return None
        inputs = linear_inputs(program)
        return Recorder(program, inputs, samples, _rows(asked), _histogram(asked))

    def follow(
        self, program: Program, result: PassResult, recorder: Recorder | None, later: Sequence[Pass]
    ) -> None:
        """Carry what is known over a pass, for a program as it left it."""
        kinds = {need.statistic for need in _statistics(later)}
        if result.activations is None or not kinds:
            self.known = Known()
            return
        if kinds & _ENDS:
            kinds |= _ENDS  # a factor of -1 makes the one the other
        known = self.known.carried(result.activations)
        if recorder is not None and recorder.used:
            known = _found(recorder)
        inputs = [node for node in linear_inputs(program) if node.name not in result.activations]
        new = derivations(program, inputs, known.all_names())
        names = {node.name for node in linear_inputs(program)}
        if not result.activations:  # passes say what became of inputs of linears alone
            names |= {node.name for one in later for node in one.observed(program)}
        self.known = known.carried(new).restricted(kinds, names)


def _found(recorder: Recorder) -> Known:
    statistics = recorder.statistics()
    return Known(statistics, {kind: set(recorder.wanted) for kind in statistics}, recorder.rows)


def _statistics(passes: Sequence[Pass]) -> list[Calibration]:
    return [need for one in passes for need in one.needs() if need.statistic != _DATA]


def _rows(needs: Sequence[Calibration]) -> int:
    return max((need.rows for need in needs), default=0)


def _histogram(needs: Sequence[Calibration]) -> bool:
    return any(need.statistic == "histogram" for need in needs)
