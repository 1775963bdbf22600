"""What equivalent transformations do for rounding: error on MiniLM, perplexity on SmolLM2.

    python benchmarks/bench_symmetry.py [--model NAME] [--only NAME] [--write | --seed N ...]

Everything is rounded and multiplied back in floating point, so the figures are those of the
method and not of a kernel. `--write` puts the table into docs/symmetry.md and the figures into
benchmarks/results/symmetry.json; rows that were not measured stay as they are. `--seed` measures
the rows with a rotation once for each seed of its random signs, and writes nothing.
"""

import argparse
import json
import re
import time
from pathlib import Path
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "symmetry.json"
PAGE = ROOT / "docs" / "symmetry.md"
MARKS = "<!-- figures:begin -->", "<!-- figures:end -->"


def quantized(dtype: str, granularity: str, symmetric: bool = True) -> dict[str, Any]:
    activations = {"dtype": dtype, "granularity": granularity, "symmetric": symmetric}
    weights = {"dtype": dtype, "granularity": "channel"}
    return {"quantize": {"weights": weights, "activations": activations, "exclude": ["lm_head"]}}


TOKEN, SHIFTED = quantized("int8", "token"), quantized("int8", "token", False)
TENSOR = quantized("int8", "tensor", False)
STATIC = {"granularity": "tensor", "symmetric": False}
# What a rotation gains depends on its random signs; docs/symmetry.md says how much.
SEED = 2


def with_seed(passes: list[Any], seed: int) -> list[Any]:
    """The same passes with other random signs."""
    return [{"rotate": {"seed": seed}} if "rotate" in entry else entry for entry in passes]


ROTATE = ["untie", {"fold-norm": {"centre": True}}, {"rotate": {"seed": SEED}}]
RECIPES: dict[str, list[Any]] = {
    "W8A8 per token": [TOKEN],
    "W8A8 per token, smoothquant 0.5": ["smoothquant", TOKEN],
    "W8A8 per token, smoothquant auto": [{"smoothquant": {"alpha": "auto"}}, TOKEN],
    "W8A8 per token, rotate": [*ROTATE, TOKEN],
    "W8A8 per token, asymmetric": [SHIFTED],
    "W8A8 per token, asymmetric, smoothquant 0.5": ["smoothquant", SHIFTED],
    "W8A8 per token, asymmetric, smoothquant auto": [
        {"smoothquant": {"alpha": "auto", "symmetric": False}},
        SHIFTED,
    ],
    "W8A8 static": [TENSOR],
    "W8A8 static, smoothquant 0.8": [{"smoothquant": {"alpha": 0.8}}, TENSOR],
    "W8A8 static, smoothquant auto": [{"smoothquant": {"alpha": "auto", **STATIC}}, TENSOR],
    "W4A4": [quantized("int4", "token")],
    "W4A4, rotate": [*ROTATE, quantized("int4", "token")],
}


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


def rows(only: str | None, seeds: list[int]) -> dict[str, list[Any]]:
    """The recipes to measure, by title; with seeds, those that have some."""
    chosen = {title: passes for title, passes in RECIPES.items() if (only or "") in title}
    if not seeds:
        return chosen
    return {
        f"{title}, seed {seed}": with_seed(passes, seed)
        for title, passes in chosen.items()
        if with_seed(passes, SEED + 1) != passes
        for seed in seeds
    }


def measure(name: str, recipes: dict[str, list[Any]], console: Console) -> dict[str, Any]:
    subject = {"minilm": MiniLM, "smollm2": SmolLM2}[name]()
    figures: dict[str, Any] = {"unit": subject.unit, "original": getattr(subject, "original", 0.0)}
    console.print(f"{name}: {subject.unit}, original {figures['original']:.4f}")
    for title, passes in recipes.items():
        started = time.perf_counter()
        figure = subject.judge(rewritten(subject.program, passes, subject.samples))
        figures[title] = {"figure": figure, "text": subject.describe(figure)}
        console.print(
            f"  {title}: {subject.describe(figure)}  [{time.perf_counter() - started:.0f} s]"
        )
    return figures


def table(results: dict[str, Any]) -> str:
    heads = {"minilm": "MiniLM, relative error", "smollm2": "SmolLM2-135M, perplexity"}
    names = [name for name in heads if name in results]
    lines = ["| recipe | " + " | ".join(heads[name] for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    originals = [f"{results[name]['original']:.3f}" for name in names]
    lines.append("| original | " + " | ".join(originals) + " |")
    for title in RECIPES:
        cells = [results[name].get(title, {}).get("text", "") for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["minilm", "smollm2"], action="append")
    parser.add_argument("--only")
    parser.add_argument("--seed", type=int, nargs="+", default=[])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.seed and options.write:
        parser.error("--write keeps the table's own seed; leave out --seed, or --write.")
    recipes = rows(options.only, options.seed)
    if not recipes:
        parser.error(f"no row to measure; the rows are: {'; '.join(RECIPES)}.")
    console = Console()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.model or ["minilm", "smollm2"]:
        results[name] = {**results.get(name, {}), **measure(name, recipes, console)}
    if not options.seed:
        console.print(table(results))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        begin, end = MARKS
        page = PAGE.read_text()
        block = f"{begin}\n{table(results)}\n{end}"
        PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: block, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
