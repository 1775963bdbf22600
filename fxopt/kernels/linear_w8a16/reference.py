"""fxopt::linear_w8a16: floating activations times int8 weights.

    y = activation(weight_scale * (x @ weight.T) + bias)

Shapes:
    x [..., K] floating; weight [N, K] int8; weight_scale [N] float32; bias [N] floating
    -> y [..., N] like x.

The arithmetic is float32 (float64 for float64), rounded once. The CPU kernel multiplies many rows
of bfloat16 in bfloat16 and so rounds the product a second time.
"""

from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import check_floating, check_int8_weight, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["linear_w8a16"]


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise KernelError("linear_w8a16 needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    check_int8_weight(weight, weight_scale, bias, x.size(-1))


@register_reference(
    "linear_w8a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation) "
    "-> Tensor"
)
def linear_w8a16(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Weight-only int8 linear layer; see the module's equation."""
    _check(x, weight, weight_scale, bias)
    dtype = compute_dtype(x)
    y = (x.to(dtype) @ weight.to(dtype).T) * weight_scale
    if bias is not None:
        y = y + bias
    return activation_function(activation)(y).to(x.dtype).contiguous()


@register_fake("linear_w8a16")
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    _check(x, weight, weight_scale, bias)
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], weight.size(0)))
