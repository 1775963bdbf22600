"""What equivalent transformations do for rounding: error on MiniLM, perplexity on SmolLM2.

    python benchmarks/bench_symmetry.py [--model NAME] [--only NAME] [--write | --seed N ...]

Everything is rounded and multiplied back in floating point, so the figures are those of the
method and not of a kernel. `--write` puts the table into docs/symmetry.md and the figures into
benchmarks/results/symmetry.json; rows that were not measured stay as they are. `--seed` measures
the rows with a rotation once for each seed of its random signs, and writes nothing.
"""

import argparse
from pathlib import Path
from typing import Any

import recipe_table
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "symmetry.json"
PAGE = ROOT / "docs" / "symmetry.md"


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

# What a static range cuts off depends on the data; the other rows read 64 paragraphs.
CALIBRATED_AS = {title: "w8a8-static-smoothquant" for title in RECIPES if "static" in title}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=recipe_table.MODELS, action="append")
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
    results = recipe_table.read(RESULTS)
    for name in options.model or recipe_table.MODELS:
        found = recipe_table.measure(name, recipes, console, CALIBRATED_AS)
        results[name] = {**results.get(name, {}), **found}
    text = recipe_table.table(results, RECIPES)
    if not options.seed:
        console.print(text)
    if options.write:
        recipe_table.write(results, RESULTS, PAGE, text)


if __name__ == "__main__":
    main()
