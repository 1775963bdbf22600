"""`gptq` beside the GPTQ of llm-compressor and gptqmodel: perplexity of SmolLM2-135M, and time.

    python -m venv peer; peer/bin/pip install llmcompressor     # or gptqmodel
    python benchmarks/bench_gptq_peers.py [--llm-compressor peer/bin/python]
        [--gptqmodel peer/bin/python] [--only NAME] [--write]

All round the same weights to int4, symmetric, head excluded, on the same calibration tokens, and
what they give is judged by the same code on the same held-out windows (see recipe_table.py). A
peer runs in an interpreter of its own (gptq_peer.py), from a plain folder to a file of weights that
have been multiplied back, so fxopt's environment needs neither. Seconds are those of the rounding
alone, by the clock: the model is loaded before. `--write` puts the figures into
benchmarks/results/gptq-peers.json; what was not measured stays as it is.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gptq_peer
import real_models
import recipe_table
import torch
from bench_quantization import CHANNEL, GROUP, gptq
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program, module_path
from fxopt.pipeline.data import calibration_samples

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gptq-peers.json"


@dataclass(frozen=True)
class Row:
    """What is rounded to, and what fxopt is told beside it; peers run by their defaults."""

    weights: dict[str, Any]
    first: int = 0  # of the 64 texts of calibration: others show how much of a difference is chance
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    ours_alone: bool = False


# 0.05 is gptqmodel's damping, 0.01 llm-compressor's and ours.
DAMPED = {"damping": 0.05}
BY_OUTPUT = {"range": "output"}
MATCHED = {"match_original": True}  # the default of `gptq`; the other rows are GPTQ as published
ROWS = {
    "int4 groups of 64": Row(GROUP),
    "int4 groups of 64, damping 0.05": Row(GROUP, options=DAMPED, ours_alone=True),
    "int4 per channel": Row(CHANNEL),
    "int4 per channel, damping 0.05": Row(CHANNEL, options=DAMPED, ours_alone=True),
    "int4 per channel, other texts": Row(CHANNEL, first=64),
    "int4 groups of 64, mse range": Row({**GROUP, "range": "mse"}, ours_alone=True),
    "int4 per channel, mse range": Row({**CHANNEL, "range": "mse"}, ours_alone=True),
    "int4 groups of 64, output range": Row({**GROUP, **BY_OUTPUT}, ours_alone=True),
    "int4 per channel, output range": Row({**CHANNEL, **BY_OUTPUT}, ours_alone=True),
    "int4 per channel, other texts, output range": Row(
        {**CHANNEL, **BY_OUTPUT}, first=64, ours_alone=True
    ),
    "int4 groups of 64, original outputs": Row(GROUP, options=MATCHED, ours_alone=True),
    "int4 per channel, original outputs": Row(CHANNEL, options=MATCHED, ours_alone=True),
    "int4 groups of 64, output range, original outputs": Row(
        {**GROUP, **BY_OUTPUT}, options=MATCHED, ours_alone=True
    ),
    "int4 per channel, output range, original outputs": Row(
        {**CHANNEL, **BY_OUTPUT}, options=MATCHED, ours_alone=True
    ),
    "int4 per channel, other texts, output range, original outputs": Row(
        {**CHANNEL, **BY_OUTPUT}, first=64, options=MATCHED, ours_alone=True
    ),
}


def samples_from(subject: recipe_table.SmolLM2, first: int) -> list[Sample]:
    if first == 0:
        return subject.samples
    _, tokenizer = real_models.load_smollm2()
    texts = real_models.prose()[first : first + 64]
    return calibration_samples(subject.program.signature, texts, tokenizer, 64, 128, 8)


def write_folder(program: Program, samples: list[Sample], folder: Path) -> None:
    """The model as transformers saves one, its tokenizer, and the calibration tokens."""
    model, tokenizer = real_models.load_smollm2()
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of the file that it was read from
    plain = type(model)(type(model.config).from_dict(config))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    place = [spec.name for spec in program.signature.inputs].index("input_ids")
    texts = [
        row[real].tolist()
        for sample in samples
        for row, real in zip(sample.inputs[place], sample.tokens, strict=True)
    ]
    (folder / "calibration.json").write_text(json.dumps(texts))


def linears_of(program: Program) -> set[str]:
    """The weights of all linears but the head."""
    linears = program.nodes(torch.ops.aten.linear.default)
    return {str(node.args[1].target) for node in linears if module_path(node) != "lm_head"}  # type: ignore[union-attr]


def ours(subject: recipe_table.SmolLM2, row: Row, samples: list[Sample]) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = gptq(row.weights, **row.options)
    program = recipe_table.rewritten(subject.program, recipe, samples)
    seconds = time.perf_counter() - started
    return {"perplexity": subject.judge(program), "seconds": round(seconds, 1)}


def theirs(
    subject: recipe_table.SmolLM2,
    peer: str,
    python: Path,
    chosen: dict[str, Any],
    samples: list[Sample],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder, weights = Path(place), Path(place) / "rounded.safetensors"
        write_folder(subject.program, samples, folder)
        command = [str(python.absolute()), gptq_peer.__file__, peer, str(folder), str(weights)]
        if "group_size" in chosen:
            command += ["--group", str(chosen["group_size"])]
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # In the folder, as both leave logs where they run.
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, env=alone, cwd=folder
        )
        if done.returncode:
            raise SystemExit(f"{peer} failed in {python}; what it said stands above.")
        told = json.loads(done.stdout.strip().splitlines()[-1])
        program = subject.program.clone()
        rounded = load_file(weights)
    expected = linears_of(program)
    if rounded.keys() != expected:
        odd = sorted(rounded.keys() ^ expected)[:5]
        raise SystemExit(f"{peer} did not round the same linears as fxopt: {odd} in only one.")
    for name, value in rounded.items():
        program.set_weight(name, value)
    seconds = round(told["seconds"], 1)
    return {
        "perplexity": subject.judge(program),
        "seconds": seconds,
        "version": told["version"],
    }


def shown(results: dict[str, Any]) -> Table:
    table = Table("format", "by", "perplexity", "seconds")
    for title, rows in results["formats"].items():
        for who, row in rows.items():
            rise = 100 * (row["perplexity"] / results["original"] - 1)
            name = f"{who} {row['version']}" if "version" in row else who
            figure = f"{row['perplexity']:.3f} ({rise:+.2f} %)"
            table.add_row(title, name, figure, f"{row['seconds']:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for peer, (package, _) in gptq_peer.PEERS.items():
        parser.add_argument(f"--{peer}", type=Path, help=f"a python that has {package}")
    parser.add_argument("--only", choices=["fxopt", *gptq_peer.PEERS])
    parser.add_argument("--format", choices=ROWS, action="append")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    pythons = {peer: vars(options)[peer.replace("-", "_")] for peer in gptq_peer.PEERS}
    console, subject = Console(), recipe_table.SmolLM2()
    results = recipe_table.read(RESULTS) or {"formats": {}}
    results |= {"original": subject.original, "threads": torch.get_num_threads()}
    for title in options.format or ROWS:
        row = ROWS[title]
        samples = samples_from(subject, row.first)
        rows = results["formats"].setdefault(title, {})
        for who in ("fxopt", *gptq_peer.PEERS):
            if options.only not in (None, who):
                continue
            if who == "fxopt":
                rows[who] = ours(subject, row, samples)
            elif row.ours_alone:
                continue
            elif pythons[who] is None:
                console.print(f"{title}: {who} left out, no --{who} says which python has it")
                continue
            else:
                rows[who] = theirs(subject, who, pythons[who], row.weights, samples)
            console.print(title, who, rows[who])
            if options.write:
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    console.print(shown(results))


if __name__ == "__main__":
    main()
