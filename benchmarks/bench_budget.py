"""A time budget on the real models: predicted and measured time of what allocate-bits chose.

    python benchmarks/bench_budget.py [--model minilm|smollm2] [--shape 1 128] [--write]

The budget lies half way between a call of the original and one with 8-bit weights and activations
everywhere, both timed alternately first. Then the model that the budget led to is timed beside the
original again. All times are those of the fastest of many calls, as the pass takes them: the others
say what else the machine did. Between the prediction and the last measurement lie minutes in which
a machine may change its speed, so the two are compared as shares of the original's time. `--write`
puts the figures into benchmarks/results/budget.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_models
import real_models
import torch
from rich.console import Console

import fxopt

RESULTS = Path(__file__).parent / "results" / "budget.json"
FOUR = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 64}}
EIGHT = {
    "weights": {"dtype": "int8", "granularity": "channel"},
    "activations": {"dtype": "int8", "granularity": "token"},
}
HEAD = {"exclude": ["lm_head"]}
NAMES, SECONDS = ("original", "optimized"), 20.0
LOADERS = {"minilm": real_models.load_minilm, "smollm2": real_models.load_smollm2}


def caller(model: Any, shape: tuple[int, int]) -> Callable[[], Any]:
    ids = torch.randint(1000, 20000, shape)
    return lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids))


def by_turns(first: Callable[[], Any], second: Callable[[], Any]) -> dict[str, float]:
    """Long enough for the fastest of the calls to be one that nothing disturbed."""
    pair = sum(bench_models.alternate(first, second, 5)[f"{name}_ms"] for name in NAMES) / 1e3
    return bench_models.alternate(first, second, max(30, round(SECONDS / pair)))


def study(model: Any, tokenizer: Any, shape: tuple[int, int]) -> dict[str, Any]:
    given = {"return_tensors": "pt", "truncation": True, "max_length": 128}
    texts = [dict(tokenizer(text, **given)) for text in real_models.prose()[:8]]
    options = {"calibration": texts, "progress": False}
    fast = fxopt.optimize(model, ["canonicalize", {"quantize": {**EIGHT, **HEAD}}], **options)
    ends = by_turns(caller(model, shape), caller(fast, shape))
    budget = (ends["original_fastest_ms"] + ends["optimized_fastest_ms"]) / 2
    allocate = {
        "budget": {"milliseconds": budget, "shape": list(shape)},
        "choices": [FOUR, EIGHT, {}],
        "sensitivity": "trace",
        "probes": 8,
        **HEAD,
    }
    recipe = ["canonicalize", {"allocate-bits": allocate}, {"quantize": HEAD}]
    made = fxopt.optimize(model, recipe, **options)
    record = next(r for r in made.report.history if r.name == "allocate-bits")
    (table,) = record.tables
    chosen = next(row for row in table.rows if row[-1] == "chosen")
    timed = by_turns(caller(model, shape), caller(made, shape))
    predicted = float(chosen[0])
    share = timed["optimized_fastest_ms"] / timed["original_fastest_ms"]
    return {
        "shape": list(shape),
        "original_ms": ends["original_fastest_ms"],
        "eight_bits_ms": ends["optimized_fastest_ms"],
        "budget_ms": budget,
        "predicted_ms": predicted,
        "predicted_share": predicted / ends["original_fastest_ms"],
        "measured_ms": timed["optimized_fastest_ms"],
        "original_then_ms": timed["original_fastest_ms"],
        "measured_share": share,
        "measured_over_predicted": share * ends["original_fastest_ms"] / predicted,
        "note": record.notes[0],
        "chosen": chosen[4],
        "frontier": [list(row) for row in table.rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=LOADERS, action="append")
    parser.add_argument("--shape", type=int, nargs=2, default=(1, 128))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.model or LOADERS:
        model, tokenizer = LOADERS[name]()
        batch, length = options.shape
        found = study(model, tokenizer, (batch, length))
        results[f"{name} {batch}x{length}"] = found
        Console().print(name, {k: v for k, v in found.items() if k != "frontier"})
        if options.write:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
