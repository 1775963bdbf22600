"""Calibration batches that are made when a pass or the verifier asks for them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program
from fxopt.ir.signature import SizeRange
from fxopt.pipeline.data import calibration_samples, standard_texts
from fxopt.pipeline.recipe import Recipe

_NATURAL_TEXTS, _NATURAL_LENGTH = 4, 64


class LazySamples:
    """Calibration batches, made at the first use and kept."""

    def __init__(
        self, program: Program, recipe: Recipe, calibration: Iterable[Any] | None, tokenizer: Any
    ) -> None:
        self.signature = program.signature
        self.settings = recipe.calibration
        self.calibration = calibration
        self.tokenizer = tokenizer
        self.made: list[Sample] | None = None

    def __call__(self) -> list[Sample]:
        """All batches."""
        if self.made is None:
            data = self.calibration
            if data is None and self.tokenizer is not None:
                data = standard_texts(None if self.settings.joined else self.settings.samples)
            self.made = calibration_samples(
                self.signature,
                () if data is None else data,
                self.tokenizer,
                self.settings.samples,
                self.settings.max_length,
                self.settings.batch_size,
                self.settings.joined,
            )
        return self.made

    def few(self) -> list[Sequence[Tensor]]:
        """Real inputs to measure quality on: some of the user's, or some prose; maybe none."""
        if self.calibration is not None:
            return [self._few_rows(sample.inputs) for sample in self()[:2]]
        if self.tokenizer is None:
            return []
        texts = standard_texts(_NATURAL_TEXTS)
        made = calibration_samples(
            self.signature, texts, self.tokenizer, len(texts), _NATURAL_LENGTH, len(texts)
        )
        return [sample.inputs for sample in made]

    def _few_rows(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        # Judging keeps what every linear gives, and logits: of a whole batch more than the model.
        rows = max(_NATURAL_TEXTS // 2, self.signature.ranges.get("batch", SizeRange()).low)
        return [
            value[:rows] if spec.shape[:1] == ("batch",) else value
            for spec, value in zip(self.signature.inputs, inputs, strict=True)
        ]
