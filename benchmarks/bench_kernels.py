"""Time every CPU kernel against what it replaces.

    python benchmarks/bench_kernels.py [--json kernels.json] [--seconds 1.0] [--threads N]

All candidates of a row run in turn, in one process, so that a disturbance of the machine hits each
alike. The table shows the median and, in brackets, how many times faster than the first column
that is, from the medians; the data holds the minimum as well.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

from fxopt.kernels import KERNELS, ensure_native, native_status
from fxopt.kernels.activation import activation_function

LINEAR_SHAPES = [
    (1, 576, 1536, "none"),
    (1, 576, 49152, "none"),
    (1, 1536, 576, "none"),
    (128, 384, 1536, "gelu"),
    (128, 1536, 384, "none"),
    (512, 576, 1536, "silu"),
    (4096, 384, 1536, "gelu"),
    (4096, 1536, 384, "none"),
]
TOKENS = (1, 128, 4096)

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """The times of one problem: candidate -> milliseconds."""

    problem: str
    median: dict[str, float]
    minimum: dict[str, float]


def measure(problem: str, candidates: Candidates, seconds: float) -> Row:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return Row(
        problem,
        {name: statistics.median(values) for name, values in times.items()},
        {name: min(values) for name, values in times.items()},
    )


def linear_candidates(m: int, k: int, n: int, activation: str) -> Candidates:
    ops = torch.ops.fxopt
    function = activation_function(activation)
    x, bias = torch.randn(m, k), torch.randn(n)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.full((n,), 0.5 / 73 / k**0.5)
    total = weight.sum(1, dtype=torch.int32)
    dense = weight * scale[:, None]
    short, short_dense, short_bias = x.bfloat16(), dense.bfloat16(), bias.bfloat16()
    q, token_scale = ops.quantize_per_token(x)
    static = token_scale.mean().reshape(1)
    factors = torch.rand(k) + 0.5
    return {
        "fp32 linear": lambda: function(functional.linear(x, dense, bias)),
        "bf16 linear": lambda: function(functional.linear(short, short_dense, short_bias)),
        "_int_mm alone": lambda: torch._int_mm(q, weight.T),
        "dynamic_linear_w8a8": lambda: ops.dynamic_linear_w8a8(
            x, weight, scale, None, bias, activation
        ),
        "asymmetric": lambda: ops.dynamic_linear_w8a8(x, weight, scale, total, bias, activation),
        "multiplied first": lambda: ops.dynamic_linear_w8a8(
            x * factors, weight, scale, total, bias, activation
        ),
        "scaled": lambda: ops.dynamic_linear_w8a8(
            x, weight, scale, total, bias, activation, factors
        ),
        "linear_w8a8 static": lambda: ops.linear_w8a8(
            q, static, None, weight, scale, None, bias, activation, torch.float32
        ),
        "linear_w8a16 fp32": lambda: ops.linear_w8a16(x, weight, scale, bias, activation),
        "linear_w8a16 bf16": lambda: ops.linear_w8a16(short, weight, scale, short_bias, activation),
    }


def gated_mlp_candidates(tokens: int, *, asymmetric: bool) -> Candidates:
    """The feed-forward block of SmolLM2-135M."""
    x = torch.randn(1, tokens, 576)
    up = torch.randint(-127, 128, (3072, 576), dtype=torch.int8)
    down = torch.randint(-127, 128, (576, 1536), dtype=torch.int8)
    up_scale, down_scale = torch.full((3072,), 3e-4), torch.full((576,), 2e-4)
    up_sum = up.sum(1, dtype=torch.int32) if asymmetric else None
    down_sum = down.sum(1, dtype=torch.int32) if asymmetric else None
    dense_up, dense_down = up * up_scale[:, None], down * down_scale[:, None]

    def eager() -> torch.Tensor:
        gate, lift = functional.linear(x, dense_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * lift, dense_down)

    return {
        "eager fp32": eager,
        "kernel": lambda: torch.ops.fxopt.dynamic_gated_mlp_w8a8(
            x, up, up_scale, up_sum, None, down, down_scale, down_sum, None, "silu"
        ),
    }


def norm_candidates(tokens: int) -> dict[str, Candidates]:
    ops = torch.ops.fxopt
    x, residual = torch.randn(2, 1, tokens, 576)
    weight, bias = torch.randn(2, 576)
    return {
        "fused_rms_norm": {
            "eager fp32": lambda: torch.rms_norm(x, (576,), weight, 1e-5),
            "kernel": lambda: ops.fused_rms_norm(x, weight, 1e-5),
        },
        "add_layer_norm": {
            "eager fp32": lambda: functional.layer_norm(x + residual, (576,), weight, bias),
            "kernel": lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-5),
        },
        "quantize_per_token": {
            "eager fp32": lambda: KERNELS["quantize_per_token"].reference(x),
            "kernel": lambda: ops.quantize_per_token(x),
            "multiplied first": lambda: ops.quantize_per_token(x * weight),
            "scaled": lambda: ops.quantize_per_token(x, weight),
        },
    }


def elementwise_candidates(tokens: int) -> dict[str, Candidates]:
    ops = torch.ops.fxopt
    heads = torch.randn(1, tokens, 9, 64).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, tokens, 64)
    gate, up = torch.randn(1, tokens, 3072).chunk(2, -1)
    table = torch.randint(-127, 128, (49152, 576), dtype=torch.int8)
    scale = torch.rand(49152)
    dense = table * scale[:, None]
    indices = torch.randint(0, 49152, (1, tokens))

    def eager_rope() -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    return {
        "apply_rope": {
            "eager fp32": eager_rope,
            "kernel": lambda: ops.apply_rope(heads, cos, sin, False),
        },
        "gated_activation": {
            "eager fp32": lambda: functional.silu(gate) * up,
            "kernel": lambda: ops.gated_activation(gate, up, "silu"),
        },
        "embedding_int8": {
            "eager fp32": lambda: functional.embedding(indices, dense),
            "kernel": lambda: ops.embedding_int8(table, scale, indices, torch.float32),
        },
    }


# B, H, Hkv, S, T, D, causal, padded: decoding and prefill of SmolLM2-135M, and MiniLM-L6.
ATTENTION_SHAPES = [
    (1, 9, 3, 1, 100, 64, True, False),
    (1, 9, 3, 1, 600, 64, True, False),
    (1, 9, 3, 1, 4096, 64, True, False),
    (1, 9, 3, 8, 600, 64, True, False),
    (1, 9, 3, 512, 512, 64, True, False),
    (32, 12, 12, 128, 128, 32, False, False),
    (32, 12, 12, 128, 128, 32, False, True),
]


def attention_candidates(
    b: int, h: int, kv: int, s: int, t: int, d: int, causal: bool, padded: bool
) -> Candidates:
    """`padded` hides some keys; else the padding is there and keeps all, or is absent."""
    q = torch.randn(b, s, h, d).transpose(1, 2)
    k, v = torch.randn(2, b, t, kv, d).transpose(2, 3)
    padding = None if causal else torch.ones(b, t, dtype=torch.bool)
    if padding is not None and padded:
        padding[::2, t * 3 // 4 :] = False
    args = (q, k, v, padding, None, None, d**-0.5, causal, None, None)
    return {
        "SDPA, no mask": lambda: functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal and s == t, enable_gqa=h != kv
        ),
        "fxopt::attention": lambda: KERNELS["fused_attention"].reference(*args),
        "kernel": lambda: torch.ops.fxopt.fused_attention(*args),
    }


def table_of(title: str, rows: list[Row]) -> Table:
    names = list(rows[0].median)
    table = Table(title=title)
    table.add_column("problem")
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    for row in rows:
        base = row.median[names[0]]
        cells = [f"{row.median[name]:.4f} ({base / row.median[name]:.1f}x)" for name in names]
        table.add_row(row.problem, f"{base:.4f}", *cells[1:])
    return table


def run(seconds: float, console: Console) -> dict[str, list[Row]]:
    linear = [
        measure(f"{m}, {k}, {n} {activation}", linear_candidates(m, k, n, activation), seconds)
        for m, k, n, activation in track(LINEAR_SHAPES, "linear", console=console)
    ]
    attention = [
        measure(str(shape), attention_candidates(*shape), seconds)
        for shape in track(ATTENTION_SHAPES, "attention", console=console)
    ]
    others: list[Row] = []
    for tokens in track(TOKENS, "other kernels", console=console):
        problems = {
            "dynamic_gated_mlp_w8a8": gated_mlp_candidates(tokens, asymmetric=False),
            "the same, asymmetric": gated_mlp_candidates(tokens, asymmetric=True),
            **norm_candidates(tokens),
            **elementwise_candidates(tokens),
        }
        others += [
            measure(f"{name}, {tokens} tokens", candidates, seconds)
            for name, candidates in problems.items()
        ]
    return {"linear": linear, "attention": attention, "others": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="write the times there")
    parser.add_argument("--seconds", type=float, default=1.0, help="per problem")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    console = Console()
    if not ensure_native():
        console.print(f"native kernels are off: {native_status().reason}")
    with torch.inference_mode():
        results = run(arguments.seconds, Console(stderr=True))
    console.print(table_of("Linear layers: M, K, N, activation", results["linear"]))
    console.print(table_of("Attention: B, H, Hkv, S, T, D, causal, padded", results["attention"]))
    console.print(table_of("Other kernels, SmolLM2-135M sizes", results["others"]))
    if arguments.json:
        facts = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        facts |= {"threads": arguments.threads, "native": native_status().reason}
        data = {kind: [asdict(row) for row in rows] for kind, rows in results.items()}
        with open(arguments.json, "w") as file:
            json.dump({"facts": facts, **data}, file, indent=1)


if __name__ == "__main__":
    main()
