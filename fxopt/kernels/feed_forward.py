"""What the operators of feed-forward blocks share: their operands, checks and definition."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.checks import (
    check_floating,
    check_int8_weight,
    check_pre_scale,
    check_weight_sum,
)
from fxopt.kernels.quantize_per_token.reference import quantize_rows

__all__ = ["Int8Linear", "check_feed_forward", "feed_forward"]


class Int8Linear(NamedTuple):
    """A linear on int8 weights: weight [N, K], scale [N], row sums [N] and bias [N] or None."""

    weight: Tensor
    scale: Tensor
    sum: Tensor | None
    bias: Tensor | None


def check_feed_forward(
    operator: str,
    x: Tensor,
    up: Int8Linear,
    down: Int8Linear,
    width: int,
    pre_scale: Tensor | None,
    down_pre_scale: Tensor | None,
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit; `width` is what `down` reads."""
    if x.dim() == 0:
        raise KernelError(f"{operator} needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    check_int8_weight(up.weight, up.scale, up.bias, x.size(-1))
    check_weight_sum(up.sum, up.weight)
    check_int8_weight(down.weight, down.scale, down.bias, width)
    check_weight_sum(down.sum, down.weight)
    check_pre_scale(pre_scale, x.size(-1))
    check_pre_scale(down_pre_scale, down.weight.size(1), "down_pre_scale")


def feed_forward(
    linear: Callable[..., Tensor],
    x: Tensor,
    up: Int8Linear,
    down: Int8Linear,
    hidden: Callable[[Tensor], Tensor],
    pre_scale: Tensor | None,
    down_pre_scale: Tensor | None,
) -> Tensor:
    """down(hidden(up(x))) by an implementation of `linear_w8a8`, in float32 between the linears."""
    q, scale, zero_point = quantize_rows(x, up.sum is not None, pre_scale)
    inner = hidden(linear(q, scale, zero_point, *up, "none", torch.float32))
    q, scale, zero_point = quantize_rows(inner, down.sum is not None, down_pre_scale)
    return linear(q, scale, zero_point, *down, "none", x.dtype)
