"""Statistics of activations, gathered in one streaming pass over calibration data."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
class Statistics:
    """What is known so far of each watched tensor, and how many tokens were seen."""

    low: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    high: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    total: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # sum of |x|, float64
    signed: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # sum of x, float64
    count: dict[str, int] = field(default_factory=dict[str, int])
    rows: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    batches: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    tokens: int = 0

    def add(self, name: str, rows: Tensor, keep: int, histogram: bool) -> None:
        """Take in rows [n, channels]; `keep` of them, evenly spaced, are kept as they are."""
        low, high = torch.aminmax(rows.float(), dim=0)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise CalibrationError(
                f"calibration data drives {name!r} to NaN or infinity. Check the data and "
                "the model's dtype."
            )
        known = name in self.low
        self.low[name] = torch.minimum(self.low[name], low) if known else low
        self.high[name] = torch.maximum(self.high[name], high) if known else high
        self.batches.setdefault(name, []).append(torch.stack([low.min(), high.max()]))
        if histogram:
            self.histograms.setdefault(name, Histogram()).add(rows)
        total = rows.abs().sum(0, dtype=torch.float64)
        self.total[name] = self.total[name] + total if known else total
        signed = rows.sum(0, dtype=torch.float64)
        self.signed[name] = self.signed[name] + signed if known else signed
        self.count[name] = self.count.get(name, 0) + len(rows)
        if keep:
            chosen = torch.linspace(0, len(rows) - 1, min(keep, len(rows))).long()
            self.rows.setdefault(name, []).append(rows[chosen].float())


def collect(
    program: Program,
    nodes: Iterable[Node],
    samples: Sequence[Sample],
    progress: Callable[[int], None] = lambda _: None,
    rows: int = 0,
    histogram: bool = False,
) -> Mapping[str, Mapping[str, Any]]:
    """Observe the outputs of `nodes` per channel (last axis) over real tokens only.

    Returns:
        {"minimum", "maximum", "mean", "mean_abs": {node: [channels]}, "rows": {node: [at most about
        `rows`, channels]}, "tokens": {node: []}, "batches": {node: [batches, 2]}, "histogram":
        {node: Histogram}}; the rows are spread evenly over the data, "tokens" is from how many the
        ranges are, "batches" has the range of each batch, and histograms of all channels together
        are there if they were asked for.

    Raises:
        CalibrationError: there was no data, or an activation was not finite.
    """
    wanted = {node.name for node in nodes}
    statistics, real = Statistics(), RealTokens(program)
    for index, sample in enumerate(samples):
        keep = -(-rows // max(1, len(samples)))
        _observe(program, wanted, sample, real, statistics, keep, histogram)
        progress(index + 1)
    if not statistics.tokens:
        raise CalibrationError(
            "a static activation range was asked for and the calibration data is empty. Pass "
            "calibration=[...] with inputs like those of the model, or texts where there is a "
            "tokenizer."
        )
    mean, mean_abs = (
        {name: total / statistics.count[name] for name, total in totals.items()}
        for totals in (statistics.signed, statistics.total)
    )
    kept = {name: torch.cat(parts) for name, parts in statistics.rows.items()}
    return {
        "minimum": statistics.low,
        "maximum": statistics.high,
        "mean": mean,
        "mean_abs": mean_abs,
        "rows": kept,
        "tokens": {name: torch.tensor(count) for name, count in statistics.count.items()},
        "batches": {name: torch.stack(ranges) for name, ranges in statistics.batches.items()},
        "histogram": statistics.histograms,
    }


def _observe(
    program: Program,
    wanted: set[str],
    sample: Sample,
    real: RealTokens,
    statistics: Statistics,
    keep: int,
    histogram: bool,
) -> None:
    def watch(node: Node, value: object) -> None:
        if node.name not in wanted or not isinstance(value, Tensor):
            return
        rows = real.rows(node, value, sample)
        if rows.numel() == 0:
            return
        statistics.add(node.name, rows, keep, histogram)

    with fitting(sample.inputs):
        run(program, sample.inputs, watch)
    statistics.tokens += sample.count


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
