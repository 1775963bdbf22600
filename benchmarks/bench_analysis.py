"""How long the symmetry analysis takes, by the number of layers of a decoder.

    python benchmarks/bench_analysis.py [--layers 2 8 16 32] [--width 1024] [--write]

Every kind of symmetry is searched once; the fastest of three runs counts. `--write` puts the
figures into benchmarks/results/analysis.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import symmetries
from fxopt.ir.program import Program
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier

RESULTS = Path(__file__).resolve().parent / "results" / "analysis.json"
QUESTIONS = {
    "scale": (Kind.SCALE, Unit.CHANNEL),
    "permute channels": (Kind.PERMUTE, Unit.CHANNEL),
    "permute heads": (Kind.PERMUTE, Unit.HEAD),
    "permute groups": (Kind.PERMUTE, Unit.GROUP),
    "rotate": (Kind.ROTATE, Unit.CHANNEL),
}


def decoder(layers: int, width: int) -> Program:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    program = fxopt.capture(LlamaForCausalLM(config).eval())
    return Manager(Verifier([], mode="off")).run(program, Recipe.resolve(["canonicalize"]).build())


def seconds(program: Program) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, (kind, unit) in QUESTIONS.items():
        times: list[float] = []
        for _ in range(3):
            started = time.perf_counter()
            symmetries(program, kind, unit)
            times.append(time.perf_counter() - started)
        figures[name] = min(times)
    return figures | {"all": sum(figures.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 16, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {"width": options.width, "seconds": {}}
    shown = Table("layers", *QUESTIONS, "all", "all, per layer", title="seconds of analysis")
    for layers in options.layers:
        figures = seconds(decoder(layers, options.width))
        results["seconds"][layers] = figures
        shown.add_row(
            str(layers),
            *(f"{figure:.3f}" for figure in figures.values()),
            f"{figures['all'] / layers:.4f}",
        )
    Console().print(shown)
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
