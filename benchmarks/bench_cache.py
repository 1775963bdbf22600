"""What a quantized cache costs and saves: perplexity on SmolLM2, and bytes against the formula.

    python benchmarks/bench_cache.py [--windows 32] [--only NAME] [--write]

Windows of 512 tokens are read 64 tokens at a time, each chunk behind the cache that the chunks
before it left, so that quantized keys and values are really read. The KL divergence from what the
original predicts stands beside perplexity, which at a tenth of a percent is mostly the luck of the
text. Bytes are those of the storages behind the state. `--write` puts the figures into
benchmarks/results/cache.json and the table into docs/kv-cache.md; rows that were not measured stay
as they are.
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
from torch import Tensor

import fxopt
from fxopt.analysis.output_error import divergence
from fxopt.ir.program import Program
from fxopt.ir.runner import Runner
from fxopt.ir.signature import Signature
from fxopt.pipeline.data import keyword_inputs
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cache.json"
PAGE = ROOT / "docs" / "kv-cache.md"
MARKS = "<!-- figures:begin -->", "<!-- figures:end -->"
LENGTH, CHUNK, BATCH = 512, 64, 4
KEYS = {"rotate": {"residual": False, "values": False, "online": False, "keys": True}}

CACHES: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "int8": {"dtype": "int8"},
    "fp8": {"dtype": "fp8_e4m3"},
    "int8, keys rotated": {"dtype": "int8"},
    "fp8, keys rotated": {"dtype": "fp8_e4m3"},
    "int4": {"dtype": "int4"},
    "int2": {"dtype": "int2"},
    "int8, fp16 scales": {"dtype": "int8", "scales": "float16"},
    "int4, fp16 scales": {"dtype": "int4", "scales": "float16"},
    "int2, fp16 scales": {"dtype": "int2", "scales": "float16"},
    "int4, fp16 scales, keys rotated": {"dtype": "int4", "scales": "float16"},
    "int2, groups of 16": {"dtype": "int2", "group": 16, "scales": "float16"},
    "int2, groups of 16, keys rotated": {"dtype": "int2", "group": 16, "scales": "float16"},
}


def canonical(model: Any) -> Program:
    manager = Manager(Verifier([], mode="off"))
    return manager.run(fxopt.capture(model), Recipe.resolve(["canonicalize"]).build())


def with_cache(program: Program, name: str) -> Program:
    """The program with its cache held as one of `CACHES`."""
    options = CACHES[name]
    if options is None:
        return program
    rotated = [KEYS] if "rotated" in name else []
    recipe = Recipe.resolve(["canonicalize", *rotated, {"quantize-cache": options}])
    return Manager(Verifier([], mode="off")).run(program, recipe.build()[1:])


class Reader:
    """Reads rows of tokens in chunks, each behind the cache of those before it."""

    def __init__(self, program: Program) -> None:
        self.signature: Signature = program.signature
        self.runner = Runner(program.graph_module)

    def start(self, rows: int) -> None:
        self.state = [
            tensor
            for state in self.signature.empty_state(rows, torch.device("cpu"))
            for tensor in state
        ]
        self.length = 0

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Logits of the next tokens [B, S, V]."""
        total = self.length + ids.shape[1]
        entry = {
            "input_ids": ids,
            "attention_mask": torch.ones(ids.shape[0], total, dtype=torch.long),
            "position_ids": torch.arange(self.length, total).expand(ids.shape[0], -1),
        }
        given = keyword_inputs(self.signature, entry)
        outputs = self.runner(*given[: len(given) - len(self.state)], *self.state)
        self.state = list(outputs[-len(self.state) :])
        self.length = total
        return outputs[0]

    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.state)


def formula(signature: Signature, length: int) -> float:
    """Bytes of one row: 2 L T Hkv h bits / 8, the scales, and the residual in floating point."""
    total, cache = 0.0, signature.cache
    states = zip(cache.states, cache.split(signature.inputs), strict=True) if cache else ()
    for form, specs in states:
        dense = specs[form.dense_part]
        heads, width = int(dense.shape[1]), int(dense.shape[3])
        if not form.dtype:
            total += length * heads * width * dense.dtype.itemsize
            continue
        scale = specs[1].dtype.itemsize
        quantized = length // form.window * form.window if form.bits else length
        total += quantized * heads * width * (form.bits or 8) / 8
        per_group = 2 * scale / form.group if form.bits else scale / width
        total += quantized * heads * width * per_group
        total += (length - quantized) * heads * width * dense.dtype.itemsize
    return total


def measure(program: Program, original: Program, windows: Tensor) -> dict[str, Any]:
    """Perplexity of all tokens and of those behind 128 others, KL; bytes of the cache."""
    reader, beside = Reader(program), Reader(original)
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    for rows in windows.split(BATCH):
        reader.start(len(rows))
        beside.start(len(rows))
        parts = rows.split(CHUNK, 1)
        logits = torch.cat([reader.read(ids) for ids in parts], 1)[:, :-1]
        exact = torch.cat([beside.read(ids) for ids in parts], 1)[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(rows), -1))
        divergences.append(divergence(exact, logits))
    held = torch.cat(losses).double()
    rows = min(BATCH, len(windows))
    figures = {
        "perplexity": float(held.mean().exp()),
        "perplexity_behind_128": float(held[:, 127:].mean().exp()),
        "kl": float(torch.cat(divergences).double().mean()),
        "windows": len(windows),
        "tokens": LENGTH,
        "bytes": reader.nbytes() / rows,
        "formula_bytes": formula(reader.signature, LENGTH),
    }
    reader.start(1)
    for ids in windows[:1, :500].split(CHUNK, 1):
        reader.read(ids)
    figures |= {"bytes_500": reader.nbytes(), "formula_bytes_500": formula(reader.signature, 500)}
    return figures


def decode_times(programs: dict[str, Program], ids: Tensor) -> dict[str, float]:
    """Milliseconds a token behind 500 others: the least of 12, in turns, on a machine not quiet."""
    readers = {name: Reader(program) for name, program in programs.items()}
    for reader in readers.values():
        reader.start(1)
        for chunk in ids[:, :500].split(CHUNK, 1):
            reader.read(chunk)
    least = dict.fromkeys(readers, float("inf"))
    for position in range(500, LENGTH):
        for name, reader in readers.items():
            started = time.perf_counter()
            reader.read(ids[:, position : position + 1])
            least[name] = min(least[name], 1000 * (time.perf_counter() - started))
    return least


def row(name: str, figures: dict[str, Any], original: dict[str, Any]) -> list[str]:
    def rise(key: str) -> str:
        return f"{100 * (figures[key] / original[key] - 1):+.3f} %"

    share = figures["bytes"] / original["bytes"]
    return [
        name,
        f"{figures['perplexity']:.3f} ({rise('perplexity')})",
        rise("perplexity_behind_128"),
        f"{1000 * figures['kl']:.2f}",
        f"{figures['bytes'] / 1024:.0f} ({100 * share:.1f} %)",
        f"{figures['formula_bytes'] / 1024:.0f}",
        f"{figures['bytes_500'] / 1024:.0f} / {figures['formula_bytes_500'] / 1024:.0f}",
        f"{figures['decode_ms']:.0f}" if "decode_ms" in figures else "",
    ]


def table(results: dict[str, Any]) -> str:
    heads = ["cache", "perplexity", "behind 128 tokens", "KL, 1/1000 nat"]
    heads += ["KiB at 512 tokens", "formula"]
    heads += ["KiB at 500 / formula", "ms per token"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in CACHES:
        if name in results:
            lines.append(f"| {' | '.join(row(name, results[name], results['float32']))} |")
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    """Keep what is measured so far: a run takes half an hour on one core."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    begin, end = MARKS
    block = f"{begin}\n{table(results)}\n{end}"
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: block, page, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = Console()
    model, tokenizer = real_models.load_smollm2()
    program = canonical(model)
    windows = real_models.token_windows(tokenizer, LENGTH, options.windows)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, asked in CACHES.items():
        needed = asked is None and name not in results
        if needed or options.only is None or options.only in name:
            results[name] = measure(with_cache(program, name), program, windows)
            console.print(" | ".join(row(name, results[name], results["float32"])))
            if options.write:
                write(results)
    programs = {name: with_cache(program, name) for name in results}
    for name, milliseconds in decode_times(programs, windows[:1]).items():
        results[name]["decode_ms"] = milliseconds
    console.print(table(results), markup=False)
    if options.write:
        write(results)


if __name__ == "__main__":
    main()
