"""Inputs that several kernel tests share."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_IDS = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")

# (leading axes, K, N): one row, batch 1, empty, tails of every block size, more rows than a block.
LINEAR_SHAPES = [
    ((1,), 1, 1),
    ((3,), 5, 7),
    ((0,), 16, 8),
    ((2, 0), 16, 8),
    ((1, 1), 576, 96),
    ((4,), 64, 64),
    ((7,), 63, 65),
    ((2, 9), 70, 130),
    ((13,), 130, 33),
    ((3, 11), 257, 61),
    ((101,), 96, 200),
    ((450,), 1100, 67),
    ((5,), 0, 3),
    ((5,), 3, 0),
]


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def weight_of(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """An int8 weight [n, k] whose outputs are of order one, its scales, and a bias."""
    scale = (torch.rand(n) + 0.5) / (73.0 * max(k, 1) ** 0.5)
    return int8(n, k), scale, torch.randn(n)


def row_sums(weight: Tensor) -> Tensor:
    return weight.sum(1, dtype=torch.int32)


def feed_forward_block(
    k: int,
    made: int,
    read: int,
    n: int,
    *,
    biased: bool = True,
    summed: Sequence[bool] = (False, False),
) -> list[Tensor | None]:
    """The operands of two linears: weights [made, k] and [n, read], scales, row sums and biases."""
    parameters: list[Tensor | None] = []
    for sizes, has_sum in zip(((made, k), (n, read)), summed, strict=True):
        weight, scale, bias = weight_of(*sizes)
        parameters += [weight, scale, row_sums(weight) if has_sum else None]
        parameters.append(bias if biased else None)
    return parameters


def pre_scale_of(k: int) -> Tensor:
    """Factors of one or two orders of magnitude for k input channels."""
    return 2 ** (2 * torch.randn(k))


def dynamic_cases(x: Tensor, up, down):
    """(operator, arguments): both dynamic operators, each operand that may be absent twice."""
    for summed, scaled in product((False, True), repeat=2):
        a, b = (
            (weight, scale, row_sums(weight) if summed else None, bias)
            for weight, scale, bias in (up, down)
        )
        scales = [pre_scale_of(part[0].size(1)) if scaled else None for part in (a, b)]
        yield "dynamic_linear_w8a8", (x, *a, "gelu", scales[0])
        yield "dynamic_gated_mlp_w8a8", (x, *a, *b, "silu", *scales)


def strided(x: Tensor) -> Tensor:
    """The values of x in memory where no axis is contiguous."""
    wide = torch.empty((*x.shape, 2), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]
