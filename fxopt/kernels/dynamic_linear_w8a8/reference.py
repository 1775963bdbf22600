"""fxopt::dynamic_linear_w8a8: quantize per token and multiply, in one operator.

    q, scale = quantize_per_token(x)
    y = activation(scale * weight_scale * (q @ weight.T) + bias)

Shapes:
    x [..., K] floating; weight [N, K] int8; weight_scale [N] float32; bias [N] floating
    -> y [..., N] like x.
"""

from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import check_floating, check_int8_weight
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_per_token
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_dynamic_linear", "dynamic_linear_w8a8"]


def check_dynamic_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit."""
    if x.dim() == 0:
        raise KernelError("dynamic_linear_w8a8 needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    check_int8_weight(weight, weight_scale, bias, x.size(-1))


@register_reference(
    "dynamic_linear_w8a8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "str activation) -> Tensor"
)
def dynamic_linear_w8a8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Linear layer on activations quantized per token; see the module's equation."""
    check_dynamic_linear(x, weight, weight_scale, bias)
    q, scale = quantize_per_token(x)
    return linear_w8a8(q, scale, None, weight, weight_scale, None, bias, activation, x.dtype)


@register_fake("dynamic_linear_w8a8")
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    check_dynamic_linear(x, weight, weight_scale, bias)
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], weight.size(0)))
