"""fxopt::dynamic_gated_mlp_w8a8 on a GPU: the Triton kernels of its two linears."""

import torch
from torch import Tensor

from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import check_gated_mlp, gated
from fxopt.kernels.feed_forward import Int8Linear
from fxopt.kernels.linear_w8a8.triton import launch as launch_linear
from fxopt.kernels.quantize_per_token.triton import launch_rows

__all__ = ["launch"]


def launch(
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
    """Gated feed-forward block on x [..., K]; y [..., N] like x."""
    gate_up = Int8Linear(gate_up_weight, gate_up_scale, gate_up_sum, gate_up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_gated_mlp(x, gate_up, down, pre_scale, down_pre_scale)
    q, scale, zero_point = launch_rows(x, gate_up_sum is not None, pre_scale)
    both = launch_linear(q, scale, zero_point, *gate_up, "none", torch.float32)
    hidden = gated(activation)(both)
    q, scale, zero_point = launch_rows(hidden, down_sum is not None, down_pre_scale)
    return launch_linear(q, scale, zero_point, *down, "none", x.dtype)
