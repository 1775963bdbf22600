"""fxopt::norm_quantize: residual sum, normalization and quantization per token, in one operator.

    s = x + residual        y = norm(s) * weight + bias
    q, scale, zero_point = quantize_rows(y * pre_scale, asymmetric)

Shapes:
    x, residual [..., D] of one dtype, D at least 1; weight, bias, pre_scale [D] floating or None;
    norm "layer" or "rms", the latter without bias -> s and y [..., D] like x, q [..., D] int8,
    scale [..., 1] float32, zero_point [..., 1] int32.

What is not asked for (s without `keep_total`, y without `keep_norm`, the zero point of symmetric
rows) is an empty tensor [0].

q is what `quantize_rows` gives for y, to the bit: y is rounded to the dtype of x before. So is s,
where it is returned; else the arithmetic is float32 up to y (float64 for float64).
"""

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating, check_pre_scale, check_same, compute_dtype
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["norm_quantize"]

NORMS = ("layer", "rms")


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    pre_scale: Tensor | None,
) -> None:
    if norm not in NORMS:
        raise KernelError(f"unknown norm '{norm}'; valid: {', '.join(NORMS)}")
    if x.dim() == 0 or x.size(-1) == 0:
        raise KernelError(
            f"norm_quantize needs a tensor [..., D] with D at least 1, got {list(x.shape)}"
        )
    check_floating(x.dtype, "x")
    if norm == "rms" and bias is not None:
        raise KernelError("an rms norm has no bias")
    if residual is not None:
        check_same(x, residual, "x and residual")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.numel() != x.size(-1):
            raise KernelError(
                f"{name} must have {x.size(-1)} elements, got {list(parameter.shape)}"
            )
    check_pre_scale(pre_scale, x.size(-1))


def _normalized(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> Tensor:
    gain, shift = (None if p is None else p.reshape(-1).to(total.dtype) for p in (weight, bias))
    if norm == "layer":
        return functional.layer_norm(total, total.shape[-1:], gain, shift, eps)
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return y if gain is None else y * gain


@register_reference(
    "norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str norm, "
    "bool asymmetric, bool keep_total, bool keep_norm, Tensor? pre_scale=None) "
    "-> (Tensor total, Tensor y, Tensor q, Tensor scale, Tensor zero_point)"
)
def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    asymmetric: bool,
    keep_total: bool,
    keep_norm: bool,
    pre_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalize and quantize each row of a residual sum; see the module's equation."""
    _check(x, residual, weight, bias, norm, pre_scale)
    dtype = compute_dtype(x)
    total = x.to(dtype).contiguous()
    if residual is not None:
        total = total + residual.to(dtype).contiguous()
    rounded = total.to(x.dtype, copy=True)
    source = rounded.to(dtype) if keep_total else total
    y = _normalized(source, weight, bias, eps, norm).to(x.dtype)
    q, scale, zero_point = quantize_rows(y, asymmetric, pre_scale)
    absent = x.new_empty(0)
    return (
        rounded if keep_total else absent,
        y if keep_norm else absent.clone(),
        q,
        scale,
        absent.to(torch.int32) if zero_point is None else zero_point,
    )


@register_fake("norm_quantize")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    asymmetric: bool,
    keep_total: bool,
    keep_norm: bool,
    pre_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, residual, weight, bias, norm, pre_scale)
    rows = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape if keep_total else (0,)),
        x.new_empty(x.shape if keep_norm else (0,)),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows if asymmetric else (0,), dtype=torch.int32),
    )
