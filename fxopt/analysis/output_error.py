"""How far a changed program's outputs are from what they were, over the real tokens of some data.

    logits         KL(softmax(y) || softmax(y')), mean over tokens, in nats
    hidden states  || y' - y ||^2 / || y ||^2
    perplexity     exp(mean cross-entropy of the next token)

Shapes: y and y' [tokens, d].
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.analysis.samples import RealTokens, Sample, real_rows
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program, dtype_of, hints, shape_of
from fxopt.ir.signature import TensorSpec

aten = torch.ops.aten
# Rows of logits that are compared at a time.
_ROWS = 256


def is_logits(output: TensorSpec) -> bool:
    """Whether an output is scores over classes."""
    return output.name.rpartition(".")[2].endswith("logits")


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) || softmax(b)) over the last axis, in nats."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def judged_outputs(program: Program) -> list[int]:
    """Which outputs errors are judged by: those that are neither whole numbers nor a cache.

    Raises:
        CalibrationError: there is none.
    """
    (results,) = program.graph.output_node().args
    cache = program.signature.cache
    nodes: Any = results[: len(results) - (cache.count if cache else 0)]  # type: ignore[index, arg-type]
    found = [i for i, node in enumerate(nodes) if getattr(dtype_of(node), "is_floating_point", 0)]
    if not found:
        raise CalibrationError(
            "errors are judged by a floating output and the model has none. Capture a model that "
            "returns logits or hidden states."
        )
    return found


@dataclass(frozen=True)
class OutputError:
    """What a program gives on some data, and how far other outputs are from it."""

    logits: Mapping[int, bool]  # the outputs that are compared, and whether they are logits
    samples: Sequence[Sample]
    exact: Sequence[Mapping[int, Tensor]]  # of each sample
    token_ids: int | None  # which input holds the tokens whose perplexity can be told
    of_decoder: Mapping[int, bool]  # whether an output's tokens are a decoder's, beside an encoder

    @staticmethod
    def of(
        program: Program, samples: Sequence[Sample], outputs: Iterable[Sequence[Tensor]]
    ) -> "OutputError":
        """From what the unchanged program gives for each sample.

        Raises:
            CalibrationError: no token is real, or what the model gives for one is not finite.
        """
        logits = {i: is_logits(program.signature.outputs[i]) for i in judged_outputs(program)}
        exact = [{i: output[i] for i in logits} for output in outputs]
        scores = next((i for i in logits if logits[i]), None)
        ids = None if scores is None else _token_ids(program, scores)
        (results,), real = program.graph.output_node().args, RealTokens(program)
        of_decoder = {i: real.of_decoder(results[i]) for i in logits}  # type: ignore[index, arg-type]
        error = OutputError(logits, samples, exact, ids, of_decoder)
        error._check()
        return error

    def _check(self) -> None:
        if not self.tokens:
            raise CalibrationError(
                "errors are judged on calibration data and no token of it is real. Pass inputs "
                "like those of the model, whose mask leaves some of them in."
            )
        for index, logits in self.logits.items():
            for rows, _ in self._rows(self.exact, index):
                # A class that is ruled out has a score of minus infinity.
                if bool((rows.isnan() if logits else ~rows.isfinite()).any()):
                    raise CalibrationError(
                        "calibration data drives the model's outputs to NaN or infinity. Check the "
                        "data and the model's dtype."
                    )

    @property
    def tokens(self) -> int:
        """On how many real tokens, or rows, errors are judged."""
        first = next(iter(self.logits))
        return sum(len(rows) for rows, _ in self._rows(self.exact, first))

    def cost(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Over all outputs, the sum of KL in nats per token or relative squared error."""
        return sum(
            self._divergence(outputs, index) if logits else self._squares(outputs, index)
            for index, logits in self.logits.items()
        )

    def relative(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """|| y' - y || / || y || of the first output, logits or not."""
        return self._squares(outputs, next(iter(self.logits))) ** 0.5

    def kl(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Mean KL over tokens, in nats; of the logits that lost most.

        Raises:
            CalibrationError: the model has no logits.
        """
        scores = [index for index, logits in self.logits.items() if logits]
        if not scores:
            raise CalibrationError("kl needs logits and the model has none; give sqnr_db instead.")
        return max(self._divergence(outputs, index) for index in scores)

    def sqnr_db(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Signal to noise over all samples, in decibels, of the output that lost most."""
        squares = max(self._squares(outputs, index) for index in self.logits)
        return -10 * math.log10(squares) if squares > 0 else math.inf

    def perplexity_rise(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Perplexity over what it was, less one.

        Raises:
            CalibrationError: the model does not predict the tokens that it reads.
        """
        scores = next((index for index, logits in self.logits.items() if logits), None)
        if self.token_ids is None or scores is None:
            raise CalibrationError(
                "perplexity needs logits over the vocabulary that the model's own embedding "
                "reads, and this model has none. Give a budget of sqnr_db or kl."
            )
        ids = [sample.inputs[self.token_ids] for sample in self.samples]
        tokens = [sample.real(self.of_decoder[scores]) for sample in self.samples]
        before = _cross_entropy([y[scores] for y in self.exact], ids, tokens)
        after = _cross_entropy([output[scores] for output in outputs], ids, tokens)
        return math.expm1(after - before)

    def _divergence(self, outputs: Sequence[Sequence[Tensor]], index: int) -> float:
        total, tokens = 0.0, 0
        for y, other in self._rows(outputs, index):
            for a, b in zip(y.split(_ROWS), other.split(_ROWS), strict=True):
                total += float(divergence(a.float(), b.float()).double().sum())
            tokens += len(y)
        return total / max(tokens, 1)

    def _squares(self, outputs: Sequence[Sequence[Tensor]], index: int) -> float:
        noise = signal = 0.0
        for y, other in self._rows(outputs, index):
            noise += float((other.double() - y.double()).square().sum())
            signal += float(y.double().square().sum())
        return noise / max(signal, 1e-30)

    def _rows(
        self, outputs: Sequence[Sequence[Tensor] | Mapping[int, Tensor]], index: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        for sample, exact, output in zip(self.samples, self.exact, outputs, strict=True):
            tokens = sample.real(self.of_decoder[index])
            yield real_rows(exact[index], tokens), real_rows(output[index], tokens)


def _cross_entropy(
    logits: Sequence[Tensor], ids: Sequence[Tensor], tokens: Sequence[Tensor | None]
) -> float:
    """Of the next token, mean over the real ones."""
    total, count = 0.0, 0
    for scores, given, known in zip(logits, ids, tokens, strict=True):
        real = torch.ones_like(given[:, 1:], dtype=torch.bool)
        if known is not None:
            real = known[:, 1:] & known[:, :-1]
        rows, targets = scores[:, :-1][real], given[:, 1:][real]
        for part, target in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
            loss = torch.nn.functional.cross_entropy(part.float(), target, reduction="sum")
            total += float(loss)
        count += len(targets)
    if count == 0:
        raise CalibrationError("perplexity needs texts of at least two tokens.")
    return total / count


def _token_ids(program: Program, output: int) -> int | None:
    """The input of the output's length that indexes a table with a row for each class."""
    (results,) = program.graph.output_node().args
    ends = hints(shape_of(results[output])[-2:])  # type: ignore[index]
    if len(ends) < 2:
        return None  # a score for each row: nothing is predicted token by token
    length, classes = ends
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in program.nodes(aten.embedding.default):
        table, ids = node.args[:2]
        read, rows = hints(shape_of(ids)), hints(shape_of(table))
        if ids in inputs and rows[:1] == [classes] and len(read) == 2 and read[1] == length:
            return inputs.index(ids)  # type: ignore[arg-type]
    return None
