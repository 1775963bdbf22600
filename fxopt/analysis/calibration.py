"""Statistics of activations, gathered in one streaming pass over calibration data."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.execution import run
from fxopt.analysis.observers import Histogram
from fxopt.analysis.samples import RealTokens, Sample
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program, dtype_of
from fxopt.ir.stored_codes import is_stored_weight

aten = torch.ops.aten


@dataclass
class _Observed:
    """What is known so far of one activation, over the real tokens of the batches seen."""

    low: Tensor
    high: Tensor
    total: Tensor  # sum of |x|, float64
    signed: Tensor  # sum of x, float64
    count: int
    rows: list[Tensor] = field(default_factory=list[Tensor])
    batches: list[Tensor] = field(default_factory=list[Tensor])
    histogram: Histogram | None = None


class Recorder:
    """Statistics of some activations, taken in as a run over calibration data computes them.

    The batches may come one after the other, or at each node all of them.

    Args:
        program: whose activations they are.
        nodes: which of them, per channel (last axis) and over real tokens only.
        samples: the data that will come.
        rows: about how many rows of each are kept as they are, spread evenly over the data.
        histogram: whether the values of all channels together are counted.
    """

    def __init__(
        self,
        program: Program,
        nodes: Iterable[Node],
        samples: Sequence[Sample],
        rows: int = 0,
        histogram: bool = False,
    ) -> None:
        self.wanted = {node.name for node in nodes}
        self.rows = rows
        self.histogram = histogram
        self._keep = -(-rows // max(1, len(samples)))
        self._real = RealTokens(program)
        self._observed: dict[str, _Observed] = {}

    def add(self, node: Node, value: object, sample: Sample) -> None:
        """Take in what a node gives for a sample; nodes that are not wanted are passed over.

        Raises:
            CalibrationError: it is not finite.
        """
        if node.name not in self.wanted or not isinstance(value, Tensor):
            return
        rows = self._real.rows(node, value, sample)
        if rows.numel():
            self._add(node.name, rows)

    def _add(self, name: str, rows: Tensor) -> None:
        low, high = torch.aminmax(rows.float(), dim=0)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise CalibrationError(
                f"calibration data drives {name!r} to NaN or infinity. Check the data and "
                "the model's dtype."
            )
        total = rows.abs().sum(0, dtype=torch.float64)
        signed = rows.sum(0, dtype=torch.float64)
        known = self._observed.get(name)
        if known is None:
            known = self._observed[name] = _Observed(low, high, total, signed, len(rows))
        else:
            known.low, known.high = torch.minimum(known.low, low), torch.maximum(known.high, high)
            known.total, known.signed = known.total + total, known.signed + signed
            known.count += len(rows)
        known.batches.append(torch.stack([low.min(), high.max()]))
        if self.histogram:
            known.histogram = known.histogram or Histogram()
            known.histogram.add(rows)
        if self._keep:
            chosen = torch.linspace(0, len(rows) - 1, min(self._keep, len(rows))).long()
            known.rows.append(rows[chosen].float())

    @property
    def used(self) -> bool:
        """Whether anything was taken in."""
        return bool(self._observed)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """What was found, by statistic and name of the node; what was never reached is not there.

        "minimum", "maximum", "mean" and "mean_abs" are [channels], "tokens" [] from how many,
        "batches" [batches, 2] the range of each batch; "rows" [n, channels] and "histogram" are
        there if they were asked for.
        """
        found = self._observed.items()
        known: dict[str, dict[str, Any]] = {
            "minimum": {name: seen.low for name, seen in found},
            "maximum": {name: seen.high for name, seen in found},
            "mean": {name: seen.signed / seen.count for name, seen in found},
            "mean_abs": {name: seen.total / seen.count for name, seen in found},
            "tokens": {name: torch.tensor(seen.count) for name, seen in found},
            "batches": {name: torch.stack(seen.batches) for name, seen in found},
        }
        if self.rows:
            known["rows"] = {name: torch.cat(seen.rows) for name, seen in found}
        if self.histogram:
            known["histogram"] = {name: seen.histogram for name, seen in found}
        return known


def collect(
    program: Program,
    nodes: Iterable[Node],
    samples: Sequence[Sample],
    progress: Callable[[int], None] = lambda _: None,
    rows: int = 0,
    histogram: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run a program over the data once; the statistics that a `Recorder` of `nodes` finds.

    Raises:
        CalibrationError: there was no data, or an activation was not finite.
    """
    recorder = Recorder(program, nodes, samples, rows, histogram)
    record(program, recorder, samples, progress)
    return recorder.statistics()


def record(
    program: Program,
    recorder: Recorder,
    samples: Sequence[Sample],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Run a program over the data once while a recorder looks on.

    Raises:
        CalibrationError: there was no data, or an activation was not finite.
    """
    for index, sample in enumerate(samples):
        watch = partial(_show, recorder, sample)
        with fitting(sample.inputs):
            run(program, sample.inputs, watch)
        progress(index + 1)
    if not any(sample.count for sample in samples):
        found = f"its {len(samples)} batches are padding alone" if samples else "it is empty"
        raise CalibrationError(
            f"statistics of activations are needed, and of the calibration data {found}. Pass "
            "calibration=[...] with inputs like those of the model, or texts where there is a "
            "tokenizer."
        )


def _show(recorder: Recorder, sample: Sample, node: Node, value: object) -> None:
    recorder.add(node, value, sample)


@contextlib.contextmanager
def fitting(inputs: Sequence[Tensor]) -> Generator[None]:
    """Say of a batch that the model cannot run that it is the batch's fault.

    Raises:
        CalibrationError: an index lies outside its table, or a size does not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        shapes = [list(value.shape) for value in inputs[:3]]
        raise CalibrationError(
            f"a batch of data with inputs of shapes {shapes} does not run through the model: "
            f"{str(error).strip().splitlines()[0]}. Pass tokens of the model's own vocabulary, and "
            "no more of them than it has positions."
        ) from error


def linear_inputs(program: Program) -> list[Node]:
    """The distinct activations that linears read whose weight, or a part of it, is stored."""
    found: dict[str, Node] = {}
    for node in program.nodes(aten.linear.default):
        source, weight = node.args[0], node.args[1]
        whole = weight.args[0] if _is_part(weight) else weight
        constant = isinstance(whole, Node) and whole.op == "get_attr"
        stored = constant or is_stored_weight(weight)
        if isinstance(source, Node) and stored and dtype_of(source) is not None:
            found[source.name] = source
    return list(found.values())


def _is_part(weight: Any) -> TypeGuard[Node]:
    return isinstance(weight, Node) and weight.target is aten.slice.Tensor
