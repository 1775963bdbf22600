"""fxopt::dynamic_gated_mlp_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

from torch import Tensor

from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import check_gated_mlp, gated
from fxopt.kernels.feed_forward import Int8Linear, feed_forward
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
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
    gate_up = Int8Linear(gate_up_weight, gate_up_scale, gate_up_sum, gate_up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_gated_mlp(x, gate_up, down, pre_scale, down_pre_scale)
    hidden = gated(activation)
    return feed_forward(linear_w8a8, x, gate_up, down, hidden, pre_scale, down_pre_scale)
