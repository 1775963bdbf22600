"""fxopt::fused_rms_norm: root-mean-square normalization over the last axis.

    y = x / sqrt(mean_d x_d**2 + eps) * weight

Shapes:
    x [..., D] floating; weight [D] floating or absent -> y [..., D] like x.

The arithmetic is float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["fused_rms_norm"]


def _check(x: Tensor, weight: Tensor | None) -> None:
    if x.dim() == 0:
        raise KernelError("fused_rms_norm needs a tensor [..., D], got a scalar")
    check_floating(x.dtype, "x")
    if weight is not None and weight.numel() != x.size(-1):
        raise KernelError(f"weight must have {x.size(-1)} elements, got {list(weight.shape)}")


@register_reference("fused_rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor")
def fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalize each row of the last axis; see the module's equation."""
    _check(x, weight)
    values = x.to(compute_dtype(x)).contiguous()
    y = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.reshape(-1).to(y.dtype)
    return y.to(x.dtype)


@register_fake("fused_rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    _check(x, weight)
    return x.new_empty(x.shape)
