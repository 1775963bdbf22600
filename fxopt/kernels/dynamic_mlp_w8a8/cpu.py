"""fxopt::dynamic_mlp_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

from torch import Tensor

from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_mlp_w8a8.reference import check_mlp
from fxopt.kernels.feed_forward import Int8Linear, feed_forward
from fxopt.kernels.linear_w8a8.cpu import linear_w8a8
from fxopt.kernels.registry import register_aten

__all__ = ["dynamic_mlp_w8a8"]


@register_aten("dynamic_mlp_w8a8")
def dynamic_mlp_w8a8(
    x: Tensor,
    up_weight: Tensor,
    up_scale: Tensor,
    up_sum: Tensor | None,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_scale: Tensor,
    down_sum: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
    down_pre_scale: Tensor | None = None,
) -> Tensor:
    """The reference on the machine's integer product."""
    up = Int8Linear(up_weight, up_scale, up_sum, up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_mlp(x, up, down, pre_scale, down_pre_scale)
    active = activation_function(activation)
    return feed_forward(linear_w8a8, x, up, down, active, pre_scale, down_pre_scale)
