"""fxopt::dynamic_linear_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

from torch import Tensor

from fxopt.kernels.dynamic_linear_w8a8.reference import check_dynamic_linear
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_per_token
from fxopt.kernels.registry import register_aten

__all__ = ["dynamic_linear_w8a8"]


@register_aten("dynamic_linear_w8a8")
def dynamic_linear_w8a8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The reference on the machine's integer product."""
    check_dynamic_linear(x, weight, weight_scale, bias)
    q, scale = quantize_per_token(x)
    return linear_w8a8(q, scale, None, weight, weight_scale, None, bias, activation, x.dtype)
