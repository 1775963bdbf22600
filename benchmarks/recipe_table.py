"""Rows of recipes judged on the two real models: error on MiniLM, perplexity on SmolLM2.

Everything is rounded and multiplied back in floating point, so the figures are those of the
method and not of a kernel.
"""

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import real_models
import torch
from rich.console import Console

import fxopt
from fxopt.analysis.execution import run
from fxopt.ir.program import Program
from fxopt.pipeline.data import calibration_samples, keyword_inputs
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier

MODELS = ("minilm", "smollm2")
MARKS = "<!-- figures:begin -->", "<!-- figures:end -->"


def rewritten(program: Program, passes: list[Any], samples: list[Any]) -> Program:
    """The program after some passes; equivalences are proven elsewhere and not judged again."""
    manager = Manager(Verifier([], mode="off"), samples=lambda: samples)
    return manager.run(program, Recipe.resolve(["canonicalize", *passes]).build()[1:])


def canonical(model: Any) -> Program:
    manager = Manager(Verifier([], mode="off"))
    return manager.run(fxopt.capture(model), Recipe.resolve(["canonicalize"]).build())


class MiniLM:
    """Relative error of the last hidden state on real tokens of held-out prose."""

    unit = "relative error"

    def __init__(self) -> None:
        model, tokenizer = real_models.load_minilm()
        self.tokenizer = tokenizer
        self.program = canonical(model)
        signature = self.program.signature
        texts = real_models.prose()[:64]
        self.samples = calibration_samples(signature, texts, tokenizer, 64, 128, 8)
        batch = dict(
            tokenizer(
                real_models.held_out_prose(64),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=128,
            )
        )
        self.real = batch["attention_mask"].bool()
        self.inputs = keyword_inputs(signature, batch)
        self.reference = run(self.program, self.inputs)[0][self.real]

    def judge(self, program: Program) -> float:
        found = run(program, self.inputs)[0][self.real]
        return float((found - self.reference).norm() / self.reference.norm())

    def describe(self, figure: float) -> str:
        return f"{figure:.4f}"


class SmolLM2:
    """Perplexity on held-out prose, 16 windows of 512 tokens, against the original's."""

    unit = "perplexity"

    def __init__(self) -> None:
        model, tokenizer = real_models.load_smollm2()
        self.tokenizer = tokenizer
        self.program = canonical(model)
        signature = self.program.signature
        texts = real_models.prose()[:64]
        self.samples = calibration_samples(signature, texts, tokenizer, 64, 128, 8)
        windows = real_models.token_windows(tokenizer, 512, 16)
        self.windows = [(w, keyword_inputs(signature, {"input_ids": w[None]})) for w in windows]
        self.original = self.judge(self.program)

    def judge(self, program: Program) -> float:
        total, count = 0.0, 0
        for window, inputs in self.windows:
            logits = run(program, inputs)[0][0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
        return float(torch.tensor(total / count).exp())

    def describe(self, figure: float) -> str:
        return f"{figure:.3f} ({100 * (figure / self.original - 1):+.2f} %)"


@cache
def subject_of(name: str) -> MiniLM | SmolLM2:
    return MiniLM() if name == "minilm" else SmolLM2()


def preset_samples(subject: MiniLM | SmolLM2, preset: str) -> list[Any]:
    """Calibration data from the front of the prose, as much of it as a preset reads."""
    data = Recipe.resolve(preset).calibration
    return calibration_samples(
        subject.program.signature,
        real_models.prose()[:512],
        subject.tokenizer,
        data.samples,
        data.max_length,
        data.batch_size,
        data.joined,
    )


def one_text(subject: SmolLM2) -> list[Any]:
    texts = real_models.prose()[:1]
    return calibration_samples(subject.program.signature, texts, subject.tokenizer, 1, 128, 1)


def measure(
    name: str,
    recipes: dict[str, list[Any]],
    console: Console,
    calibrated_as: Mapping[str, str] = MappingProxyType({}),
    by_one_text: Collection[str] = (),
) -> dict[str, Any]:
    """Figures by title; `calibrated_as` names the presets whose calibration some rows take.

    Rows that would take hours on the larger model see one text there: `by_one_text`.
    """
    subject = subject_of(name)
    figures: dict[str, Any] = {"unit": subject.unit, "original": getattr(subject, "original", 0.0)}
    for title, passes in recipes.items():
        started = time.perf_counter()
        preset = calibrated_as.get(title)
        samples = subject.samples if preset is None else preset_samples(subject, preset)
        if title in by_one_text and isinstance(subject, SmolLM2):
            samples = one_text(subject)
        program = rewritten(subject.program, passes, samples)
        figure = subject.judge(program)
        share = program.byte_count() / subject.program.byte_count()
        text = subject.describe(figure)
        figures[title] = {"figure": figure, "text": text, "bytes": round(share, 4)}
        seconds = time.perf_counter() - started
        console.print(f"{name}, {title}: {subject.unit} {text}  [{seconds:.0f} s]")
    return figures


def _cell(row: dict[str, Any], sizes: bool) -> str:
    share = f", {row['bytes']:.2f}x bytes" if sizes and "bytes" in row else ""
    return f"{row['text']}{share}" if row else ""


def table(results: dict[str, Any], titles: Iterable[str], sizes: bool = False) -> str:
    """One row for each recipe; with the bytes of all weights over the original's."""
    heads = {"minilm": "MiniLM, relative error", "smollm2": "SmolLM2-135M, perplexity"}
    names = [name for name in heads if name in results]
    lines = ["| recipe | " + " | ".join(heads[name] for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    originals = [f"{results[name]['original']:.3f}" for name in names]
    lines.append("| original | " + " | ".join(originals) + " |")
    for title in titles:
        cells = [_cell(results[name].get(title, {}), sizes) for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(results: dict[str, Any], path: Path, page: Path, text: str) -> None:
    """Figures as data, and the table between the marks of a page."""
    path.write_text(json.dumps(results, indent=2) + "\n")
    begin, end = MARKS
    block = f"{begin}\n{text}\n{end}"
    changed = re.sub(f"{begin}.*{end}", lambda _: block, page.read_text(), flags=re.DOTALL)
    page.write_text(changed)
