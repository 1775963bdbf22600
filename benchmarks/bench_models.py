"""Quality, size and speed of the presets on MiniLM and SmolLM2.

    python benchmarks/bench_models.py [--model minilm|smollm2] [--recipe w8a8-dynamic] [--json out]

Original and optimized model are timed alternately in one process; ratios are of medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_models
import torch
from rich.console import Console
from rich.table import Table

import fxopt


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        first()
        second()
        for _ in range(rounds):
            for function, kept in zip((first, second), times, strict=True):
                started = time.perf_counter()
                function()
                kept.append(time.perf_counter() - started)
    original, optimized = (statistics.median(kept) for kept in times)
    return {
        "original_ms": original * 1e3,
        "optimized_ms": optimized * 1e3,
        "ratio": original / optimized,
        "original_fastest_ms": min(times[0]) * 1e3,
        "optimized_fastest_ms": min(times[1]) * 1e3,
        "ratio_of_fastest": min(times[0]) / min(times[1]),
    }


def minilm(recipe: str, rounds: int) -> dict[str, Any]:
    model, tokenizer = real_models.load_minilm()
    started = time.perf_counter()
    optimized = fxopt.optimize(model, recipe)
    seconds = time.perf_counter() - started
    result = sizes(optimized, seconds)
    batch = tokenizer(
        real_models.held_out_prose(64),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=128,
    )
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = model(**batch).last_hidden_state, optimized(**batch).last_hidden_state
    result["relative_error"] = float((a[real] - b[real]).norm() / a[real].norm())
    result["mean_cosine"] = float((pooled(a, real) * pooled(b, real)).sum(-1).mean())
    for shape in ((1, 128), (32, 128)):
        inputs = {
            "input_ids": torch.randint(1000, 20000, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        result[f"speed {shape}"] = alternate(
            lambda i=inputs: model(**i), lambda i=inputs: optimized(**i), rounds
        )
    return result


def pooled(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    weight = real[..., None].float()
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def smollm2(recipe: str, rounds: int) -> dict[str, Any]:
    model, tokenizer = real_models.load_smollm2()
    started = time.perf_counter()
    optimized = fxopt.optimize(model, recipe)
    result = sizes(optimized, time.perf_counter() - started)
    windows = real_models.token_windows(tokenizer, 512, 16)
    before, after = (real_models.perplexity(m, windows) for m in (model, optimized))
    result |= {"perplexity": before, "perplexity_optimized": after}
    result["perplexity_rise_percent"] = (after / before - 1) * 100
    prompt = windows[:1]
    result["prefill 512"] = alternate(
        lambda: model(input_ids=prompt, use_cache=True),
        lambda: optimized(input_ids=prompt, use_cache=True),
        max(4, rounds // 4),
    )
    steps = {name: decoder(m, prompt[:, :128]) for name, m in (("a", model), ("b", optimized))}
    result["decode after 128"] = alternate(steps["a"], steps["b"], rounds * 2)
    return result


def decoder(model: Any, prompt: torch.Tensor) -> Callable[[], Any]:
    """One step of decoding at a time, the cache growing as it does in `generate`."""
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values

    def step() -> Any:
        nonlocal cache
        output = model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return output

    return step


def sizes(optimized: Any, seconds: float) -> dict[str, Any]:
    report = optimized.report
    return {
        "optimize_seconds": seconds,
        "sites": {record.name: len(record.sites) for record in report.history},
        "bytes": report.bytes_after,
        "bytes_ratio": report.bytes_after / report.bytes_before,
        "bytes_held_ratio": report.bytes_held / report.bytes_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["minilm", "smollm2"], action="append")
    parser.add_argument("--recipe", default="w8a8-dynamic")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in options.model or ["minilm", "smollm2"]:
        results[name] = {"minilm": minilm, "smollm2": smollm2}[name](options.recipe, options.rounds)
        show(f"{name}, {options.recipe}", results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def show(title: str, result: dict[str, Any]) -> None:
    table = Table("figure", "value", title=title)
    for key, value in result.items():
        if isinstance(value, dict) and "ratio" in value:
            text = f"{value['original_ms']:.2f} ms / {value['optimized_ms']:.2f} ms"
            table.add_row(key, f"{text} = {value['ratio']:.2f}x")
        else:
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
