"""fxopt::linear_w8a8 in ATen operators, for CPUs where cpu.cpp cannot be built."""

import functools

import torch
from torch import Tensor

from fxopt.kernels.linear_w8a8.reference import check_linear, check_scale, epilogue
from fxopt.kernels.registry import register_aten

__all__ = ["integer_product", "linear_w8a8"]

# 1024 products of 127 * 127 add up to less than 2**24: float32 holds every partial sum exactly.
EXACT_CHUNK = 1024


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` adds extreme values without saturating on this machine.

    CPUs without VNNI multiply pairs of bytes into int16, which extreme values overflow.
    """
    signs = torch.where(torch.arange(4096) % 3 == 0, -127, 127).to(torch.int8)
    a = torch.stack([signs, torch.full_like(signs, 127), torch.full_like(signs, -127)] * 8)
    b = a[:16].roll(1, 1)
    try:
        product = torch.ops.aten._int_mm(a, b.T)
    except RuntimeError:
        return False
    return torch.equal(product.double(), a.double() @ b.double().T)


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """The exact int32 product [M, N] of q [M, K] and weight [N, K] transposed."""
    if q.numel() == 0 or weight.numel() == 0:
        return q.new_zeros((q.size(0), weight.size(0)), dtype=torch.int32)
    # With K = 1 the strides of weight.T are ambiguous, and `_int_mm` reads past its end.
    if q.size(1) > 1 and int_mm_is_exact():
        return torch.ops.aten._int_mm(q, weight.T)
    product = q.new_zeros((q.size(0), weight.size(0)), dtype=torch.int32)
    for a, b in zip(q.split(EXACT_CHUNK, 1), weight.split(EXACT_CHUNK, 1), strict=True):
        product += (a.to(torch.float32) @ b.to(torch.float32).T).to(torch.int32)
    return product


@register_aten("linear_w8a8")
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
    """The reference with the machine's integer product in place of float64."""
    check_linear(q, scale, zero_point, weight, weight_scale, weight_sum, bias, dtype)
    check_scale(q, scale, zero_point)
    rows = q.reshape(q.shape[:-1].numel(), q.size(-1)).contiguous()
    product = integer_product(rows, weight.contiguous())
    if zero_point is not None and weight_sum is not None:
        product = product - zero_point.reshape(-1, 1) * weight_sum
    y = epilogue(product, scale, weight_scale, bias, activation, dtype)
    return y.reshape(*q.shape[:-1], weight.size(0))
