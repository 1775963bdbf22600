"""Calibration data as flat inputs of a program: tensors, dicts, tuples, or texts."""

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError
from fxopt.ir.signature import Signature
from fxopt.runtime.calling import bind_keywords, bind_structured, fill_defaults
from fxopt.runtime.state import read_cache


def calibration_samples(
    signature: Signature,
    calibration: Iterable[Any],
    tokenizer: Any,
    samples: int,
    max_length: int,
    batch_size: int,
    joined: bool = False,
) -> list[Sample]:
    """The first `samples` entries of the data, as the program takes them.

    With `joined` an entry is as many texts as fill `max_length` tokens.

    Raises:
        CalibrationError: an entry cannot be used; texts came without a tokenizer.
    """
    texts: list[str] = []
    ready: list[Sample] = []
    if isinstance(calibration, str | Mapping | Tensor):
        calibration = [calibration]
    if not hasattr(calibration, "__iter__"):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}; pass a list of inputs like those of "
            "the model, or of texts where there is a tokenizer."
        )
    if joined and tokenizer is not None:
        length = _longest(signature, max_length)
        calibration = joined_texts(calibration, tokenizer, length)
    for entry in islice(calibration, samples):
        if isinstance(entry, str):
            texts.append(entry)
        else:
            ready.append(_sample(signature, entry))
    if texts and tokenizer is None:
        raise CalibrationError(
            "calibration holds texts and no tokenizer was found for the model. Pass tokenized "
            "inputs: calibration=[tokenizer(text, return_tensors='pt'), ...]."
        )
    for start in range(0, len(texts), batch_size):
        ready.append(_tokenize(signature, tokenizer, texts[start : start + batch_size], max_length))
    return ready


def joined_texts(entries: Iterable[Any], tokenizer: Any, length: int) -> Iterator[Any]:
    """Texts in turn joined by blank lines until they hold `length` tokens; all else as it is."""
    parts: list[str] = []
    tokens = 0
    for entry in entries:
        if not isinstance(entry, str):
            yield entry
            continue
        parts.append(entry)
        tokens += len(tokenizer(entry, add_special_tokens=False)["input_ids"])
        if tokens >= length:
            yield "\n\n".join(parts)
            parts, tokens = [], 0
    if parts:
        yield "\n\n".join(parts)


def _tokenize(signature: Signature, tokenizer: Any, texts: list[str], max_length: int) -> Sample:
    if getattr(tokenizer, "pad_token", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=_longest(signature, max_length),
    )
    known = {spec.name for spec in signature.inputs}
    return _sample(signature, {k: v for k, v in encoded.items() if k in known})


def _longest(signature: Signature, max_length: int) -> int:
    """How many tokens to keep of a text: no more than the program takes."""
    highs = [limit.high for name, limit in signature.ranges.items() if name != "batch"]
    return min([max_length, *(high for high in highs if high is not None)])


def _sample(signature: Signature, entry: Any) -> Sample:
    tensors = _flat(signature, entry)
    return Sample(tensors, *token_masks(signature, tensors))


def _flat(signature: Signature, entry: Any) -> list[Tensor]:
    by_keyword = bool(signature.input_structure["items"][1]["items"])
    args, kwargs = ((), entry) if isinstance(entry, Mapping) else (_as_tuple(entry), {})
    if (by_keyword and not args) or signature.cache is not None or signature.defaults:
        return keyword_inputs(signature, kwargs, args)
    tensors = bind_structured(signature, args, kwargs)
    signature.check(tensors)
    return tensors


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def token_masks(
    signature: Signature, tensors: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are real, and which of a decoder's, from the masks among the inputs."""
    named = {spec.name: value for spec, value in zip(signature.inputs, tensors, strict=True)}
    tokens, decoder_tokens = (
        _as_tokens(named.get(name)) for name in ("attention_mask", "decoder_attention_mask")
    )
    if "input_ids" in named and named.get("decoder_input_ids") is named["input_ids"]:
        # A decoder that is shown the encoder's tokens was given no mask of its own.
        decoder_tokens = tokens
    return tokens, decoder_tokens


def _as_tokens(mask: Tensor | None) -> Tensor | None:
    """A mask [B, S] of real tokens; floating ones with negative numbers are added to scores."""
    if mask is None or mask.dim() != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    return mask.bool()


def keyword_inputs(
    signature: Signature, entry: Mapping[str, Any], args: Sequence[Any] = ()
) -> list[Tensor]:
    """Flat inputs for keyword tensors; defaults filled in, the cache empty."""
    bound = bind_keywords(signature, args, entry)
    count = signature.cache.count if signature.cache else 0
    specs = signature.inputs[: len(signature.inputs) - count]
    if signature.step_inputs and "decoder_input_ids" not in bound and "input_ids" in bound:
        bound["decoder_input_ids"] = bound["input_ids"]
    fill_defaults(signature, specs, bound, 0)
    tensors = [bound[spec.name] for spec in specs]
    past = []
    if count:
        past = read_cache(signature, None, tensors[0].shape[0], tensors[0].device)
    signature.check(tensors + past)
    return tensors + past


def standard_texts(count: int | None) -> list[str]:
    """English prose that every Python has: the language's own documentation; None: all of it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return list(islice(_paragraphs(topics), count))


def _paragraphs(topics: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            text = re.sub(r"\s+", " ", block).strip()
            if len(text) >= 200:
                yield text
