"""A mixture of experts with weights of few bits beside the same in float32: time and memory.

    python benchmarks/bench_experts.py [--rounds 7] [--write]

A Qwen3-MoE of 4 layers with 32 experts of which 4 are chosen reads a prompt of 128 tokens and one
token behind it, in turn with the original; its weights are random, for only time and bytes are
looked at. `--write` puts the figures into benchmarks/results/experts.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bench_models
import torch
import transformers
from rich.console import Console
from rich.table import Table

import fxopt

RESULTS = Path(__file__).parent / "results" / "experts.json"
GROUPS = {"dtype": "int4", "granularity": "group", "group_size": 64}
RECIPES: dict[str, Any] = {
    "int8 per channel": ["canonicalize", "quantize"],
    "int4 groups of 64": ["canonicalize", {"quantize": {"weights": GROUPS}}],
}


def mixture() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_experts=32,
        num_experts_per_tok=4,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def study(model: Any, recipe: Any, rounds: int) -> dict[str, Any]:
    started = time.perf_counter()
    optimized = fxopt.optimize(model, recipe, progress=False)
    seconds = time.perf_counter() - started
    ids = torch.randint(0, 8192, (1, 128))

    readers = [lambda each=each: each(input_ids=ids) for each in (model, optimized)]
    tokens = [bench_models.decoder(each, ids) for each in (model, optimized)]
    return {
        "prompt": bench_models.alternate(*readers, rounds),
        "token": bench_models.alternate(*tokens, 4 * rounds),
        **bench_models.sizes(optimized, seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    model, results = mixture(), {}
    table = Table("recipe", "prompt of 128", "one token", "bytes stored", "bytes running")
    for title, recipe in RECIPES.items():
        found = results[title] = study(model, recipe, options.rounds)
        ratios = (f"{found[kind]['ratio']:.2f}x as fast" for kind in ("prompt", "token"))
        sizes = (f"{found[kind]:.2f}x" for kind in ("bytes_ratio", "bytes_held_ratio"))
        table.add_row(title, *ratios, *sizes)
    Console().print(table)
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
