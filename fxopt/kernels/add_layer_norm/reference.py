"""fxopt::add_layer_norm: residual sum and layer normalization.

    s = x + residual        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Shapes:
    x, residual [..., D] of one dtype; weight, bias [D] floating -> y [..., D] like x.

The sum and the arithmetic are float32 (float64 for float64), rounded once.
"""

from torch import Tensor
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating, check_same, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["add_layer_norm"]


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_same(x, residual, "x and residual")
    check_floating(x.dtype, "x")
    if x.dim() == 0:
        raise KernelError("add_layer_norm needs a tensor [..., D], got a scalar")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.numel() != x.size(-1):
            raise KernelError(
                f"{name} must have {x.size(-1)} elements, got {list(parameter.shape)}"
            )


@register_reference(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor"
)
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of a residual sum; see the module's equation."""
    _check(x, residual, weight, bias)
    dtype = compute_dtype(x)
    total = (x.to(dtype) + residual.to(dtype)).contiguous()
    if total.numel() == 0:
        return total.to(x.dtype)
    width = x.size(-1)
    gain, shift = weight.reshape(width).to(dtype), bias.reshape(width).to(dtype)
    return functional.layer_norm(total, (width,), gain, shift, eps).to(x.dtype)


@register_fake("add_layer_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _check(x, residual, weight, bias)
    return x.new_empty(x.shape)
