"""fxopt::dynamic_linear_w8a8: quantize per token and multiply, in one operator.

    q, scale, zero_point = quantize_rows(x * pre_scale, asymmetric=weight_sum is not None)
    y = activation(scale * weight_scale * ((q - zero_point) @ weight.T) + bias)

Shapes:
    x [..., K] floating; weight [N, K] int8; weight_scale [N] float32;
    weight_sum [N] int32, the row sums of weight, or None; bias [N] floating or None;
    pre_scale [K] floating or None -> y [..., N] like x.

Activations are symmetric without weight_sum, and have a zero point per token with it. The product
with pre_scale is float32 and is not rounded to the dtype of x.
"""

from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import (
    check_floating,
    check_int8_weight,
    check_pre_scale,
    check_weight_sum,
)
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_dynamic_linear", "dynamic_linear_w8a8"]


def check_dynamic_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    pre_scale: Tensor | None,
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit."""
    if x.dim() == 0:
        raise KernelError("dynamic_linear_w8a8 needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    check_int8_weight(weight, weight_scale, bias, x.size(-1))
    check_weight_sum(weight_sum, weight)
    check_pre_scale(pre_scale, x.size(-1))


@register_reference(
    "dynamic_linear_w8a8(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_sum, Tensor? bias, str activation, Tensor? pre_scale=None) -> Tensor"
)
def dynamic_linear_w8a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
) -> Tensor:
    """Linear layer on activations quantized per token; see the module's equation."""
    check_dynamic_linear(x, weight, weight_scale, weight_sum, bias, pre_scale)
    q, scale, zero_point = quantize_rows(x, weight_sum is not None, pre_scale)
    return linear_w8a8(
        q, scale, zero_point, weight, weight_scale, weight_sum, bias, activation, x.dtype
    )


@register_fake("dynamic_linear_w8a8")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
) -> Tensor:
    check_dynamic_linear(x, weight, weight_scale, weight_sum, bias, pre_scale)
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], weight.size(0)))
