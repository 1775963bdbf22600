"""fxopt::quantize_per_token in Triton: one program per token."""

# Kernels are written in Triton's language, whose values and launches have no Python types.
# pyright: basic, reportMissingParameterType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.quantize_per_token.reference import check_rows

__all__ = ["launch", "launch_rows", "quantize_per_token_kernel"]

MAX_BLOCK = 4096


@triton.jit
def _load_scaled(x, pre_scale, k, K, HAS_PRE_SCALE: tl.constexpr):
    """Elements k of a row x [K] times those of pre_scale [K], in float32."""
    b_x = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if HAS_PRE_SCALE:
        b_x = b_x * tl.load(pre_scale + k, mask=k < K, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def quantize_per_token_kernel(
    x,
    pre_scale,
    q,
    scale,
    zero_point,
    K,
    stride,
    HAS_PRE_SCALE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row to int8, symmetric or with a zero point; see the reference for the equations.

    x [M, K] with rows `stride` apart; pre_scale [K]; q [M, K] int8; scale [M] float32;
    zero_point [M] int32.

    Extremes are taken on the bits: for non-negative floats integers sort alike, with NaN above
    infinity, so neither is lost; with the sign flipped, the least value is the largest. Adding and
    taking away 1.5 * 2**23 rounds to the nearest integer, ties to even, on every backend and in
    the interpreter.
    """
    row = tl.program_id(0).to(tl.int64)
    b_high = tl.zeros([BLOCK_K], dtype=tl.int32)
    b_low = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_x = _load_scaled(x + row * stride, pre_scale, k, K, HAS_PRE_SCALE)
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_high = tl.maximum(b_high, b_bits)
        b_low = tl.maximum(b_low, b_bits ^ -0x80000000)
    high = tl.max(b_high, 0)
    low = tl.max(b_low, 0)
    zero = 0.0
    if ASYMMETRIC:
        lowest = low.to(tl.float32, bitcast=True)
        s = tl.div_rn(high.to(tl.float32, bitcast=True) + lowest, 255.0)
        finite = s < float("inf")
        s = tl.where(s < 1.1754943508222875e-38, 1.1754943508222875e-38, s)
        zero = (tl.div_rn(lowest, s) + 12582912.0) - 12582912.0
        zero = tl.where(finite, zero - 128.0, 0.0)
        tl.store(zero_point + row, zero.to(tl.int32))
    else:
        bits = tl.maximum(high, low)
        finite = bits < 0x7F800000
        s = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
        s = tl.where(s < 1.1754943508222875e-38, 1.1754943508222875e-38, s)
    tl.store(scale + row, s)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_x = _load_scaled(x + row * stride, pre_scale, k, K, HAS_PRE_SCALE)
        b_q = (tl.div_rn(b_x, tl.zeros_like(b_x) + s) + 12582912.0) - 12582912.0
        if ASYMMETRIC:
            b_q = tl.minimum(tl.maximum(b_q + zero, -128.0), 127.0)
        tl.store(q + row * K + k, tl.where(finite, b_q, 0.0).to(tl.int8), mask=k < K)


def launch(x: Tensor, pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K] per token: q [..., K] int8 and scale [..., 1] float32."""
    q, scale, _ = launch_rows(x, asymmetric=False, pre_scale=pre_scale)
    return q, scale


def launch_rows(
    x: Tensor, asymmetric: bool, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, with the zero point [..., 1] int32 of asymmetric rows."""
    check_rows(x, pre_scale)
    width = x.size(-1)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    zero_point = torch.empty_like(scale, dtype=torch.int32) if asymmetric else None
    if scale.numel() == 0:
        return q, scale, zero_point
    rows = x.reshape(scale.numel(), width)
    if width > 0 and rows.stride(1) != 1:
        rows = rows.contiguous()
    block = min(MAX_BLOCK, triton.next_power_of_2(max(width, 1)))
    with torch.cuda.device_of(x):
        quantize_per_token_kernel[(scale.numel(),)](
            rows,
            # Pointers that a flag switches off still need a tensor; scale stands in.
            scale if pre_scale is None else pre_scale.contiguous(),
            q,
            scale,
            scale if zero_point is None else zero_point,
            width,
            rows.stride(0),
            HAS_PRE_SCALE=pre_scale is not None,
            ASYMMETRIC=asymmetric,
            BLOCK_K=block,
            num_warps=4 if block <= 2048 else 8,
            enable_fp_fusion=True,
        )
    return q, scale, zero_point
