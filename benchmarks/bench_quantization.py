"""What methods of quantization cost: error on MiniLM, perplexity on SmolLM2, and bytes.

    python benchmarks/bench_quantization.py [--model minilm|smollm2] [--only NAME] [--write]

The weights of SmolLM2 lie on a 4-bit grid of groups of 32, so other groupings are judged, and
MiniLM, whose weights are full precision. The head stays in floating point. `--write` puts the table
into docs/quantization.md and the figures into benchmarks/results/quantization.json; rows that were
not measured stay as they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipe_table
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantization.json"
PAGE = ROOT / "docs" / "quantization.md"
HEAD = {"exclude": ["lm_head"]}


def weights(dtype: str, group: int | None = None, **options: Any) -> dict[str, Any]:
    size = {} if group is None else {"group_size": group}
    granularity = "channel" if group is None else "group"
    return {"dtype": dtype, "granularity": granularity, **size, **options}


def rounded(chosen: dict[str, Any], search: str = "absmax") -> list[Any]:
    return [{"quantize": {"weights": {**chosen, "range": search}, **HEAD}}]


def gptq(chosen: dict[str, Any], match_original: bool = False, **options: Any) -> list[Any]:
    """Without `match_original` as GPTQ was published."""
    return [{"gptq": {"weights": chosen, "match_original": match_original, **options, **HEAD}}]


def matched(chosen: dict[str, Any], **options: Any) -> list[Any]:
    """As `gptq` comes: towards the outputs of the original model, and of ranges by output error."""
    return gptq({**chosen, "range": "output"}, match_original=True, **options)


def awq(chosen: dict[str, Any], search: str = "output") -> list[Any]:
    return [{"awq-scale": {"weights": chosen}}, *rounded(chosen, search)]


CHANNEL, GROUP = weights("int4"), weights("int4", 64)
THREE, TWO = weights("int3", 64), weights("int2", 64)
PER_HEAD = {"dtype": "int4", "granularity": "head", "groups_per_head": 8}
INT4_TOKENS = {
    "quantize": {"weights": None, "activations": {"dtype": "int4", "granularity": "token"}, **HEAD}
}
INT8_TOKENS = {
    "quantize": {"weights": None, "activations": {"dtype": "int8", "granularity": "token"}, **HEAD}
}
FP8_TOKENS = {
    "quantize": {
        "weights": None,
        "activations": {"dtype": "fp8_e4m3", "granularity": "token"},
        **HEAD,
    }
}

ASYMMETRIC = {"granularity": "token", "symmetric": False}
ROWS = {"granularity": "block", "block_size": [16, -1]}
# Of the two models of this benchmark: ZeroQuant rounds the feed-forward to four bits.
FEED_FORWARD = ["*.intermediate.dense", "encoder.layer.?.output.dense", "*.mlp.*"]


def static(**options: Any) -> dict[str, Any]:
    """int8 weights per channel, and activations rounded by scales from calibration."""
    activations = {"granularity": "tensor", "symmetric": False, **options}
    return {"quantize": {"activations": activations, **HEAD}}


def allocated(
    sensitivity: str, budget: dict[str, Any] | None = None, further: Sequence[Any] = ()
) -> list[Any]:
    """4-bit groups of 64, 8 bits per channel or a further choice for each group of linears."""
    choices = [{"weights": GROUP}, {"weights": weights("int8")}, *further]
    budget = budget or {"bits": 5.5}
    chosen = {"choices": choices, "sensitivity": sensitivity, "budget": budget, **HEAD}
    return [{"allocate-bits": chosen}, *rounded(GROUP)]


ROTATE = ["untie", {"fold-norm": {"centre": True}}, {"rotate": {"seed": 2}}]
RECIPES: dict[str, list[Any]] = {
    "W8A8 static": [static()],
    "W8A8 static, moving average": [static(observer="moving_average")],
    "W8A8 static, percentile 99.99": [static(observer="percentile")],
    "W8A8 static, percentile 99.999": [static(observer="percentile", percentile=99.999)],
    "W8A8 static, mse": [static(observer="mse")],
    "W8A8 static, kl": [static(observer="kl")],
    "W8A8 static, symmetric": [static(symmetric=True)],
    "W8A8 static, symmetric, peg with 6 groups": [
        "peg",
        static(granularity="embedding_group", symmetric=True),
    ],
    "W8A8 static, peg with 6 groups": [
        {"peg": {"symmetric": False}},
        static(granularity="embedding_group"),
    ],
    "W8A8 static, 512 paragraphs": [static()],
    "W8A8 static, 512 paragraphs, peg with 6 groups": [
        {"peg": {"symmetric": False}},
        static(granularity="embedding_group"),
    ],
    "W8A8 static, 512 paragraphs, symmetric": [static(symmetric=True)],
    "W8A8 static, 512 paragraphs, symmetric, peg with 6 groups": [
        "peg",
        static(granularity="embedding_group", symmetric=True),
    ],
    "W8A8 static, mixed precision keeps 10": [static(), "mixed-precision"],
    "W8A8 per token, weights per channel": [{"quantize": {"activations": ASYMMETRIC, **HEAD}}],
    "W8A8 per token, zeroquant": [
        {"quantize": {"weights": ROWS, "activations": ASYMMETRIC, **HEAD}},
    ],
    "W4/8A8 per token, zeroquant": [
        {"quantize": {"weights": GROUP, "activations": ASYMMETRIC, "include": FEED_FORWARD}},
        {"quantize": {"weights": ROWS, "activations": ASYMMETRIC, **HEAD}},
    ],
    "W8A8 per token, llm-int8": [{"llm-int8": HEAD}],
    "W8A8 per token, llm-int8 dynamic": [{"llm-int8": {"outliers": "dynamic", **HEAD}}],
    "5.5 bits, allocated by output error": allocated("output"),
    "5.5 bits, allocated by Hessian traces": allocated("trace"),
    "5.5 bits, allocated by eigenvalues": allocated("eigenvalue"),
    "5.5 bits, allocated by output error, gptq": [*allocated("output")[:1], gptq(GROUP)[0]],
    "20 dB, the fewest bytes": allocated("output", {"sqnr_db": 20}, [{}]),
    "int4 per channel, to nearest": rounded(CHANNEL),
    "int4 per channel, output range": rounded(CHANNEL, "output"),
    "int4 per channel, bias correction": [
        {"quantize": {"weights": CHANNEL, "bias_correction": True, **HEAD}}
    ],
    "int4 per channel, awq": awq(CHANNEL),
    "int4 per channel, gptq": gptq(CHANNEL),
    "int4 per channel, gptq, not true-sequential": gptq(CHANNEL, true_sequential=False),
    "int4 per channel, gptq, without act-order": gptq(CHANNEL, act_order=False),
    "int4 per channel, gptq, bias correction": gptq(CHANNEL, bias_correction=True),
    "int4 per channel, gptq, output range": gptq({**CHANNEL, "range": "output"}),
    "int4 per channel, gptq, output range, not true-sequential": gptq(
        {**CHANNEL, "range": "output"}, true_sequential=False
    ),
    "int4 per channel, gptq, output range, original outputs": matched(CHANNEL),
    "int4 groups of 64, to nearest": rounded(GROUP),
    "int4 groups of 64, mse range": rounded(GROUP, "mse"),
    "int4 groups of 64, clipped by output error": rounded(GROUP, "output"),
    "int4 groups of 64, awq": awq(GROUP),
    "int4 groups of 64, gptq": gptq(GROUP),
    "int4 groups of 64, gptq, not true-sequential": gptq(GROUP, true_sequential=False),
    "int4 groups of 64, gptq, mse range": gptq({**GROUP, "range": "mse"}),
    "int4 groups of 64, gptq, output range": gptq({**GROUP, "range": "output"}),
    "int4 groups of 64, gptq, output range, original outputs": matched(GROUP),
    "int4 groups of 64 asymmetric, gptq": gptq({**GROUP, "symmetric": False}),
    "int4 groups of 64 asymmetric, gptq, output range": gptq(
        {**GROUP, "symmetric": False, "range": "output"}
    ),
    "int4 groups of 64 asymmetric, gptq, output range, original outputs": matched(
        {**GROUP, "symmetric": False}
    ),
    "int4, 8 groups per head": rounded(PER_HEAD),
    "int4, 8 groups per head, gptq": gptq(PER_HEAD),
    "int4, 8 groups per head, gptq, output range": gptq({**PER_HEAD, "range": "output"}),
    "int4, 8 groups per head, gptq, output range, original outputs": matched(PER_HEAD),
    "nf4 groups of 64": rounded(weights("nf4", 64)),
    "gobo, 4 bits": [{"gobo": {"bits": 4, **HEAD}}],
    "gobo, 3 bits": [{"gobo": {"bits": 3, **HEAD}}],
    "int3 groups of 64, to nearest": rounded(THREE),
    "int3 groups of 64, gptq": gptq(THREE),
    "int3 groups of 64, gptq, not true-sequential": gptq(THREE, true_sequential=False),
    "int3 groups of 64, gptq, mse range": gptq({**THREE, "range": "mse"}),
    "int3 groups of 64, gptq, output range": gptq({**THREE, "range": "output"}),
    "int3 groups of 64, gptq, output range, original outputs": matched(THREE),
    "int2 groups of 64, to nearest": rounded(TWO),
    "int2 groups of 64, gptq, output range, original outputs": matched(TWO),
    "fp8 e4m3 per channel": rounded(weights("fp8_e4m3")),
    "fp8 e5m2 per channel": rounded(weights("fp8_e5m2")),
    "W8A8 fp8 e4m3 per token": [*rounded(weights("fp8_e4m3")), FP8_TOKENS],
    "W4A8 per token, groups of 64, gptq": [*gptq(GROUP), INT8_TOKENS],
    "W4A4 per token, rotate": [*ROTATE, *rounded(CHANNEL), INT4_TOKENS],
    "W4A4 per token, rotate, gptq": [*ROTATE, *gptq(CHANNEL), INT4_TOKENS],
    "W4A4 per token, rotate, gptq, mse range": [
        *ROTATE,
        *gptq({**CHANNEL, "range": "mse"}),
        INT4_TOKENS,
    ],
    "W4A4 per token, rotate, gptq, output range": [
        *ROTATE,
        *gptq({**CHANNEL, "range": "output"}),
        INT4_TOKENS,
    ],
    "W4A4 per token, rotate, gptq, output range, original outputs": [
        *ROTATE,
        *matched(CHANNEL),
        INT4_TOKENS,
    ],
}
# A range of few channels needs more data; the other rows read 64 paragraphs.
CALIBRATED_AS = {title: "w8a8-static-peg" for title in RECIPES if "512 paragraphs" in title}
BY_ONE_TEXT = {"5.5 bits, allocated by eigenvalues"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=recipe_table.MODELS, action="append")
    parser.add_argument("--only", help="rows whose title contains this")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    recipes = {title: rows for title, rows in RECIPES.items() if (options.only or "") in title}
    if not recipes:
        parser.error(f"no row to measure; the rows are: {'; '.join(RECIPES)}.")
    console = Console()
    results = recipe_table.read(RESULTS)

    def table() -> str:
        return recipe_table.table(results, RECIPES, sizes=True)

    for name in options.model or recipe_table.MODELS:
        for title, passes in recipes.items():
            found = recipe_table.measure(name, {title: passes}, console, CALIBRATED_AS, BY_ONE_TEXT)
            results[name] = {**results.get(name, {}), **found}
            if options.write:
                recipe_table.write(results, RESULTS, PAGE, table())
    console.print(table())


if __name__ == "__main__":
    main()
