"""Why a static range that clips ruins MiniLM: what clipping alone costs, and at which tokens.

    python benchmarks/bench_observers.py [--json out]

The input of every linear (but the pooler's) is clipped to the range that an observer finds on the
calibration data, and not rounded: at all tokens, at [CLS] alone, or at all but [CLS]; then the same
with no more than the inputs of queries, keys and values clipped. The error is that of
recipe_table.MiniLM. The last column is the share of calibration tokens of which anything is clipped
at queries, keys and values.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import recipe_table
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import Interpreter, Node

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.analysis.execution import run
from fxopt.analysis.observers import Histogram, Range, kl_range, percentile_range
from fxopt.analysis.samples import real_rows
from fxopt.ir.program import Program, shape_of

LINEAR = torch.ops.aten.linear.default
OBSERVERS: dict[str, Callable[[Histogram], Range]] = {
    "percentile 99.9": lambda seen: percentile_range(seen, 99.9),
    "percentile 99.99": lambda seen: percentile_range(seen, 99.99),
    "percentile 99.999": lambda seen: percentile_range(seen, 99.999),
    "kl": lambda seen: kl_range(seen, 128),
}
# Which tokens of [B, S, d] are clipped.
TOKENS = {"all": slice(None), "[CLS]": slice(0, 1), "all but [CLS]": slice(1, None)}


class Clipped(Interpreter):
    """A program whose linears read clipped inputs at some tokens."""

    def __init__(self, program: Program, ranges: Mapping[str, Range], tokens: slice) -> None:
        super().__init__(program.graph_module)
        self.ranges = ranges
        self.tokens = tokens

    def run_node(self, n: Node) -> Any:
        source = n.args[0] if n.op == "call_function" and n.target is LINEAR else None
        if not isinstance(source, Node) or source.name not in self.ranges:
            return super().run_node(n)
        x, *rest = self.fetch_args_kwargs_from_env(n)[0]
        clipped = x.clone()
        clipped[:, self.tokens] = x[:, self.tokens].clamp(*self.ranges[source.name])
        return LINEAR(clipped, *rest)


@torch.no_grad()
def error(subject: recipe_table.MiniLM, ranges: Mapping[str, Range], tokens: slice) -> float:
    found = Clipped(subject.program, ranges, tokens).run(*subject.inputs)[0][subject.real]
    return float((found - subject.reference).norm() / subject.reference.norm())


def share_of_tokens(subject: recipe_table.MiniLM, ranges: Mapping[str, Range]) -> float:
    """How many tokens of the calibration data have a value beyond the range, of all of them."""
    beyond, count = 0, 0

    def watch(node: Node, value: object) -> None:
        nonlocal beyond, count
        if node.name in ranges and isinstance(value, Tensor):
            low, high = ranges[node.name]
            rows = real_rows(value, tokens)
            beyond += int(((rows < low) | (rows > high)).any(1).sum())
            count += len(rows)

    for sample in subject.samples:
        tokens = sample.tokens
        run(subject.program, sample.inputs, watch)
    return beyond / count


def measure() -> dict[str, dict[str, float]]:
    subject = recipe_table.MiniLM()
    inputs = [node for node in linear_inputs(subject.program) if len(shape_of(node)) == 3]
    seen = collect(subject.program, inputs, subject.samples, histogram=True)["histogram"]
    attention = {node.name for node in inputs if len(readers(node)) == 3}
    found: dict[str, dict[str, float]] = {}
    for name, observer in OBSERVERS.items():
        ranges = {node.name: observer(seen[node.name]) for node in inputs}
        projected = {node: edges for node, edges in ranges.items() if node in attention}
        figures = {label: error(subject, ranges, at) for label, at in TOKENS.items()}
        figures |= {
            f"{label}, q k v": error(subject, projected, at) for label, at in TOKENS.items()
        }
        found[name] = figures | {"share of tokens": share_of_tokens(subject, projected)}
    return found


def readers(node: Node) -> list[Node]:
    return [user for user in node.users if user.target is LINEAR]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("clipped to", *next(iter(found.values())))
    for name, figures in found.items():
        table.add_row(name, *(f"{figure:.4f}" for figure in figures.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
