"""fxopt::dynamic_gated_mlp_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

import torch
from torch import Tensor

from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import check_gated_mlp
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_per_token
from fxopt.kernels.registry import register_aten

__all__ = ["dynamic_gated_mlp_w8a8"]


@register_aten("dynamic_gated_mlp_w8a8")
def dynamic_gated_mlp_w8a8(
    x: Tensor,
    gate_up_weight: Tensor,
    gate_up_scale: Tensor,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_scale: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The reference on the machine's integer product."""
    check_gated_mlp(
        x, gate_up_weight, gate_up_scale, gate_up_bias, down_weight, down_scale, down_bias
    )
    q, scale = quantize_per_token(x)
    gate_up = linear_w8a8(
        q, scale, None, gate_up_weight, gate_up_scale, None, gate_up_bias, "none", torch.float32
    )
    gate, up = gate_up.chunk(2, -1)
    q, scale = quantize_per_token(activation_function(activation)(gate) * up)
    return linear_w8a8(q, scale, None, down_weight, down_scale, None, down_bias, "none", x.dtype)
