"""fxopt::dynamic_linear_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

from torch import Tensor

from fxopt.kernels.dynamic_linear_w8a8.reference import check_dynamic_linear
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from fxopt.kernels.registry import register_aten

__all__ = ["dynamic_linear_w8a8"]


@register_aten("dynamic_linear_w8a8")
def dynamic_linear_w8a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
) -> Tensor:
    """The reference on the machine's integer product."""
    check_dynamic_linear(x, weight, weight_scale, weight_sum, bias, pre_scale)
    q, scale, zero_point = quantize_rows(x, weight_sum is not None, pre_scale)
    return linear_w8a8(
        q, scale, zero_point, weight, weight_scale, weight_sum, bias, activation, x.dtype
    )
