"""fxopt::linear_w8a8: int8 activations times int8 weights, with the epilogue.

    y = activation(scale * weight_scale * (q - zero_point) @ weight.T + bias)

Shapes:
    q [..., K] int8; scale float32, one element (static) or one per row [..., 1];
    zero_point int32 like scale; weight [N, K] int8; weight_scale [N] float32;
    weight_sum [N] int32, the row sums of weight, needed with zero_point; bias [N] floating
    -> y [..., N] of `dtype`.

The product is an exact integer; with a zero point it is (q @ weight.T) - zero_point * weight_sum,
an integer as well. The epilogue runs in float32 and rounds once, to `dtype`.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import check_floating, check_int8_weight
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_linear", "epilogue", "linear_w8a8"]


def check_linear(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit; row counts are left to run time."""
    if q.dim() == 0 or q.dtype != torch.int8:
        raise KernelError(f"q must be int8 [..., K], got {q.dtype} {list(q.shape)}")
    if scale.dtype != torch.float32:
        raise KernelError(f"scale must be float32, got {scale.dtype}")
    check_floating(dtype, "dtype")
    check_int8_weight(weight, weight_scale, bias, q.size(-1))
    if zero_point is None:
        return
    if zero_point.dtype != torch.int32:
        raise KernelError(f"zero_point must be int32, got {zero_point.dtype}")
    if weight_sum is None or weight_sum.dtype != torch.int32:
        raise KernelError("zero_point needs weight_sum, the int32 row sums of weight")


def check_scale(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Raise a KernelError unless there is one scale, or one per row, and as many zero points."""
    rows = q.shape[:-1].numel()
    if scale.numel() not in (1, rows):
        raise KernelError(
            f"scale must be float32 with one element or one per row ({rows}), "
            f"got {list(scale.shape)}"
        )
    if zero_point is not None and zero_point.numel() != scale.numel():
        raise KernelError(
            f"zero_point must be int32 and shaped like scale {list(scale.shape)}, "
            f"got {list(zero_point.shape)}"
        )


def epilogue(
    product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Scale, bias and activation of an integer product [M, N], in float32, rounded to `dtype`."""
    y = product.to(torch.float32) * (scale.reshape(-1, 1) * weight_scale.reshape(1, -1))
    if bias is not None:
        y = y + bias.reshape(1, -1)
    return activation_function(activation)(y).to(dtype)


_OUTPUTS_AT_ONCE = 512


@register_reference(
    "linear_w8a8(Tensor q, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_sum, Tensor? bias, str activation, ScalarType dtype) -> Tensor"
)
def linear_w8a8(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Integer linear layer; see the module's equation."""
    check_linear(q, scale, zero_point, weight, weight_scale, weight_sum, bias, dtype)
    check_scale(q, scale, zero_point)
    rows = q.reshape(q.shape[:-1].numel(), q.size(-1))
    # Below 2**53 float64 adds integers exactly, and every device has its product. A weight is
    # converted some outputs at a time: in float64 it is eight times as large.
    rows = rows.to(torch.float64)
    parts = weight.split(_OUTPUTS_AT_ONCE)
    product = torch.cat([rows @ part.to(torch.float64).T for part in parts], -1)
    if zero_point is not None and weight_sum is not None:
        product = product - zero_point.reshape(-1, 1) * weight_sum.to(torch.float64)
    y = epilogue(product, scale, weight_scale, bias, activation, dtype)
    return y.reshape(*q.shape[:-1], weight.size(0))


@register_fake("linear_w8a8")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check_linear(q, scale, zero_point, weight, weight_scale, weight_sum, bias, dtype)
    activation_function(activation)
    return q.new_empty((*q.shape[:-1], weight.size(0)), dtype=dtype)
