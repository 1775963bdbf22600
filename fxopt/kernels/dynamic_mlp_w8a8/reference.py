"""fxopt::dynamic_mlp_w8a8: a feed-forward block without a gate on int8 weights, in one operator.

    h = activation(dynamic_linear(x * pre_scale, up_weight))
    y = dynamic_linear(h * down_pre_scale, down_weight)

Shapes:
    x [..., K] floating; up_weight [F, K] int8; up_scale [F] float32; up_sum [F] int32 or None;
    up_bias [F]; down_weight [N, F] int8; down_scale [N] float32; down_sum [N] int32 or None;
    down_bias [N]; pre_scale [K] and down_pre_scale [F] floating or None -> y [..., N] like x.

Both linears quantize their input per token, asymmetrically where the sum of their weight is given.
What lies between them stays in float32, so the result is rounded to the dtype of x once; in float32
the operator is its two linears, to the bit.
"""

from torch import Tensor

from fxopt.kernels.activation import activation_function
from fxopt.kernels.feed_forward import Int8Linear, check_feed_forward, feed_forward
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_mlp", "dynamic_mlp_w8a8"]


def check_mlp(
    x: Tensor,
    up: Int8Linear,
    down: Int8Linear,
    pre_scale: Tensor | None,
    down_pre_scale: Tensor | None,
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit."""
    width = up.weight.size(0)
    check_feed_forward("dynamic_mlp_w8a8", x, up, down, width, pre_scale, down_pre_scale)


@register_reference(
    "dynamic_mlp_w8a8(Tensor x, Tensor up_weight, Tensor up_scale, Tensor? up_sum, "
    "Tensor? up_bias, Tensor down_weight, Tensor down_scale, Tensor? down_sum, "
    "Tensor? down_bias, str activation, Tensor? pre_scale=None, "
    "Tensor? down_pre_scale=None) -> Tensor"
)
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
    """Feed-forward block without a gate; see the module's equation."""
    up = Int8Linear(up_weight, up_scale, up_sum, up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_mlp(x, up, down, pre_scale, down_pre_scale)
    active = activation_function(activation)
    return feed_forward(linear_w8a8, x, up, down, active, pre_scale, down_pre_scale)


@register_fake("dynamic_mlp_w8a8")
def _(
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
    up = Int8Linear(up_weight, up_scale, up_sum, up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_mlp(x, up, down, pre_scale, down_pre_scale)
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], down_weight.size(0)))
