"""What quantizing an activation where it is made saves, in CPU time of one thread.

    python benchmarks/bench_fusions.py [--seconds 2.0]

Parts and fused kernel run in turn; the figures are the fastest of each, in microseconds, and the
ratio. CPU time does not count what other work on the machine takes, but its caches are shared.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxopt.kernels import ensure_native

ops = torch.ops.fxopt
ROWS = (1, 128, 512, 4096)
WIDTH, HIDDEN, PROJECTED = 384, 1536, 1152  # MiniLM's; the last is q, k and v

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def linear_of(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs) + 0.5) / (73 * inputs**0.5)
    return weight, scale, weight.sum(1, dtype=torch.int32), torch.randn(outputs)


def feed_forward(rows: int) -> Pair:
    up, down, x = linear_of(HIDDEN, WIDTH), linear_of(WIDTH, HIDDEN), torch.randn(rows, WIDTH)

    def parts() -> Tensor:
        return ops.dynamic_linear_w8a8(ops.dynamic_linear_w8a8(x, *up, "gelu"), *down, "none")

    return parts, lambda: ops.dynamic_mlp_w8a8(x, *up, *down, "gelu")


def norm(rows: int, kind: str, keep_total: bool) -> Pair:
    """Sum, norm and linear; the norm is kept after a layer norm, else the sum where asked."""
    linear, (x, residual) = linear_of(PROJECTED, WIDTH), torch.randn(2, rows, WIDTH)
    gain, shift = torch.randn(2, WIDTH)
    layer = kind == "layer"
    added = layer or keep_total
    operands = (x, residual if added else None, gain, shift if layer else None, 1e-5, kind)

    def parts() -> tuple[Tensor, Tensor]:
        if layer:
            total = y = ops.add_layer_norm(x, residual, gain, shift, 1e-5)
        else:
            total = x + residual if added else x
            y = ops.fused_rms_norm(total, gain, 1e-5)
        return total, ops.dynamic_linear_w8a8(y, *linear, "none")

    def fused() -> tuple[Tensor, Tensor]:
        total, y, *codes = ops.norm_quantize(*operands, True, keep_total, layer)
        return y if layer else total, ops.linear_w8a8(*codes, *linear, "none", torch.float32)

    return parts, fused


def fastest(pair: Pair, seconds: float) -> list[float]:
    best = [float("inf")] * 2
    stop, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or rounds < 5:
        rounds += 1
        for index, function in enumerate(pair):
            started = time.thread_time()
            function()
            best[index] = min(best[index], time.thread_time() - started)
    return [value * 1e6 for value in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per row of the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not ensure_native():
        parser.error("the kernels could not be built; see fxopt.kernels.native_status().")
    table = Table("fusion", "rows", "parts, us", "fused, us", "parts / fused")
    for rows in ROWS:
        pairs = {
            "feed-forward with GELU": feed_forward(rows),
            "add, layer norm (kept), linear": norm(rows, "layer", False),
            "rms norm, linear": norm(rows, "rms", False),
            "add (kept), rms norm, linear": norm(rows, "rms", True),
        }
        for title, pair in pairs.items():
            parts, fused = fastest(pair, options.seconds)
            table.add_row(
                title, str(rows), *(f"{t:.0f}" for t in (parts, fused)), f"{parts / fused:.3f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
