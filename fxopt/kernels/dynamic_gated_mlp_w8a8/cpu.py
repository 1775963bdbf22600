"""fxopt::dynamic_gated_mlp_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

import torch
from torch import Tensor

from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import check_gated_mlp
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from fxopt.kernels.registry import register_aten

__all__ = ["dynamic_gated_mlp_w8a8"]


@register_aten("dynamic_gated_mlp_w8a8")
def dynamic_gated_mlp_w8a8(
    x: Tensor,
    gate_up_weight: Tensor,
    gate_up_scale: Tensor,
    gate_up_sum: Tensor | None,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_scale: Tensor,
    down_sum: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
    down_pre_scale: Tensor | None = None,
) -> Tensor:
    """The reference on the machine's integer product."""
    check_gated_mlp(
        x,
        gate_up_weight,
        gate_up_scale,
        gate_up_sum,
        gate_up_bias,
        down_weight,
        down_scale,
        down_sum,
        down_bias,
        pre_scale,
        down_pre_scale,
    )
    q, scale, zero_point = quantize_rows(x, gate_up_sum is not None, pre_scale)
    gate_up = linear_w8a8(
        q,
        scale,
        zero_point,
        gate_up_weight,
        gate_up_scale,
        gate_up_sum,
        gate_up_bias,
        "none",
        torch.float32,
    )
    gate, up = gate_up.chunk(2, -1)
    hidden = activation_function(activation)(gate) * up
    q, scale, zero_point = quantize_rows(hidden, down_sum is not None, down_pre_scale)
    return linear_w8a8(
        q, scale, zero_point, down_weight, down_scale, down_sum, down_bias, "none", x.dtype
    )
