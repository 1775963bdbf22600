"""fxopt::apply_rope: rotary position embedding.

    half-split:    y = x * cos + concat(-x2, x1) * sin,  x1 and x2 the halves of the R channels
    interleaved:   y_2i = x_2i * cos_2i - x_2i+1 * sin_2i,
                   y_2i+1 = x_2i+1 * cos_2i+1 + x_2i * sin_2i+1

Shapes:
    x [B, H, S, D]; cos, sin of one shape that broadcasts to [B, H, S, R], R even and at most D
    -> y [B, H, S, D] with the dtype of x and, where x is dense, its strides.

Channels from R on pass through. The arithmetic is float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["apply_rope"]


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4:
        raise KernelError(f"x must be [B, H, S, D], got {list(x.shape)}")
    if cos.dim() == 0 or cos.shape != sin.shape:
        raise KernelError(
            f"cos and sin must have one shape, got {list(cos.shape)} and {list(sin.shape)}"
        )
    r = cos.size(-1)
    if r % 2 != 0 or r > x.size(-1):
        raise KernelError(
            f"cos has R = {r} channels, which must be even and at most D = {x.size(-1)}"
        )
    check_floating(x.dtype, "x")


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@register_reference("apply_rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R channels by their positions; see the module's equation."""
    _check(x, cos, sin)
    dtype = compute_dtype(x)
    r = cos.size(-1)
    turning, rest = x[..., :r].to(dtype), x[..., r:].to(dtype)
    turned = turning * cos.to(dtype) + _quarter_turn(turning, interleaved) * sin.to(dtype)
    return torch.empty_like(x).copy_(torch.cat((turned, rest), -1))


@register_fake("apply_rope")
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    _check(x, cos, sin)
    return torch.empty_like(x)
