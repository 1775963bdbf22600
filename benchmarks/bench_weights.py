"""Weights of few bits: error and bytes of rounding, learned tables and corrected biases.

    python benchmarks/bench_weights.py [--model NAME] [--only NAME]

The error is that of MiniLM's last hidden state on held-out prose, relative to the original's, or
the perplexity of SmolLM2. Bytes are those of everything that is stored; "linears" are those of what
the linears' weights became alone.
"""

import argparse
import time
from typing import Any

import torch
from recipe_table import MODELS, rewritten, subject_of
from rich.console import Console

from fxopt.ir.program import Program
from fxopt.ir.stored_codes import code_names, is_stored_weight
from fxopt.pipeline.recipe import Recipe


def rounded(dtype: str, **more: Any) -> dict[str, Any]:
    return {"quantize": {"weights": {"dtype": dtype, "granularity": "channel"}, **more}}


def grouped(dtype: str, **more: Any) -> dict[str, Any]:
    weights = {"dtype": dtype, "granularity": "group", "group_size": 64}
    return {"quantize": {"weights": weights, **more}}


def preset(name: str) -> list[Any]:
    return [{name: options} for name, options in Recipe.resolve(name).entries()][1:]


INT3_GROUPS = {"dtype": "int3", "granularity": "group", "group_size": 64}
RECIPES: dict[str, list[Any]] = {
    "int4 per channel": [rounded("int4")],
    "int4 per channel, biases corrected": [rounded("int4", bias_correction=True)],
    "int4 per group of 64": [grouped("int4")],
    "nf4 per group of 64": [grouped("nf4")],
    "nf4 per group of 64, biases corrected": [grouped("nf4", bias_correction=True)],
    "gobo, 4 bits": [{"gobo": {"bits": 4}}],
    "gobo, 4 bits, embeddings": [{"gobo": {"bits": 4, "embeddings": True}}],
    "int3 per channel": [rounded("int3")],
    "int3 per channel, biases corrected": [rounded("int3", bias_correction=True)],
    "int3 per group of 64": [grouped("int3")],
    "int3 per group of 64, gptq": [{"gptq": {"weights": INT3_GROUPS, "match_original": False}}],
    "int3 per group of 64, gptq, biases corrected": [
        {"gptq": {"weights": INT3_GROUPS, "match_original": False, "bias_correction": True}}
    ],
    "gobo, 3 bits": [{"gobo": {"bits": 3}}],
    "gobo, 3 bits, embeddings": [{"gobo": {"bits": 3, "embeddings": True}}],
    **{f"preset {name}": preset(name) for name in ("w4a16-nf4", "w3-gobo")},
}


def linear_bytes(program: Program) -> int:
    """Bytes from which the weights of linears are read."""
    names: set[str] = set()
    for node in program.nodes(torch.ops.aten.linear.default):
        weight: Any = node.args[1]
        names.update(code_names(weight) if is_stored_weight(weight) else [str(weight.target)])
    return sum(program.weight(name).nbytes for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    subject = subject_of(options.model)
    original = subject.program
    console.print(f"original: {linear_bytes(original):,} of {original.byte_count():,} bytes")
    for title, passes in RECIPES.items():
        if options.only not in title:
            continue
        started = time.perf_counter()
        program = rewritten(original, passes, subject.samples)
        console.print(
            f"{title}: {subject.unit} {subject.describe(subject.judge(program))}, linears "
            f"{linear_bytes(program):,} of {program.byte_count():,} bytes  "
            f"[{time.perf_counter() - started:.0f} s]"
        )


if __name__ == "__main__":
    main()
