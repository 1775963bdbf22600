"""Texts as calibration data: one by one, or joined to running text of a given length."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt import api
from fxopt.errors import CalibrationError
from fxopt.pipeline import lazy_samples
from fxopt.pipeline.data import calibration_samples, joined_texts, standard_texts
from fxopt.pipeline.recipe import Recipe, presets
from tests.models import canonical_program, optimize_zoo

WORDS = st.integers(1, 6).map(lambda count: " ".join(["word"] * count))


class Words:
    """One token for each word; a blank line is none."""

    pad_token = "."

    def __call__(self, texts: Any, max_length: int = 10**6, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [7] * len(texts.split())}
        lengths = [min(len(text.split()), max_length) for text in texts]
        ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}


@given(texts=st.lists(WORDS, max_size=20), length=st.integers(1, 12))
def test_joined_texts_keep_every_text_and_are_just_long_enough(texts, length):
    joined = list(joined_texts(texts, Words(), length))
    assert [part for text in joined for part in text.split("\n\n")] == texts
    for text in joined[:-1]:
        *first, _ = text.split("\n\n")
        assert len(text.split()) >= length > len(" ".join(first).split())


def test_entries_that_are_no_texts_are_not_joined():
    entry = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert list(joined_texts(["a", entry, "b c"], Words(), 3)) == [entry, "a\n\nb c"]


@pytest.mark.parametrize(("joined", "shape"), [(True, (2, 6)), (False, (2, 2))])
def test_as_many_samples_as_were_asked_for(joined, shape):
    """Alone a text fills a sample with two tokens, joined with as many as there is room for."""
    signature = canonical_program("bert").signature
    samples = calibration_samples(signature, ["a b"] * 30, Words(), 4, 6, 2, joined)
    assert [tuple(sample.inputs[0].shape) for sample in samples] == [shape, shape]
    assert all(bool(sample.tokens.all()) for sample in samples)


@pytest.mark.parametrize("joined", [True, False])
def test_texts_without_a_tokenizer_are_refused(joined):
    signature = canonical_program("bert").signature
    with pytest.raises(CalibrationError, match="no tokenizer was found"):
        calibration_samples(signature, ["a text"], None, 4, 6, 2, joined)


def test_the_standard_texts_fill_what_a_preset_reads():
    data = presets()["w8a8-static-smoothquant"].calibration
    assert data.joined
    assert not Recipe.resolve("w8a8-static").calibration.joined
    texts = standard_texts(None)
    assert texts[:8] == standard_texts(8)
    full = [len(text.split()) for text in joined_texts(texts, Words(), data.max_length)]
    assert sum(words >= data.max_length for words in full) >= data.samples


@pytest.mark.parametrize(("joined", "length"), [(True, 20), (False, 7)])
def test_a_recipe_says_whether_texts_are_joined(joined, length):
    seen = []

    def recorded(*arguments: Any) -> Any:
        seen.append(calibration_samples(*arguments))
        return seen[-1]

    recipe = {
        "passes": ["canonicalize", {"quantize": {"activations": {"granularity": "tensor"}}}],
        "calibration": {"samples": 2, "max_length": 20, "batch_size": 1, "joined": joined},
    }
    with (
        mock.patch.object(lazy_samples, "calibration_samples", recorded),
        mock.patch.object(api, "_tokenizer_of", return_value=Words()),
    ):
        optimize_zoo("bert", recipe, calibration=["a b c d e f g"] * 9)
    shapes = [tuple(sample.inputs[0].shape) for sample in seen[0]]
    assert shapes == [(1, length)] * 2
