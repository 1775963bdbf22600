"""fxopt::linear_w8a8 in Triton: int8 dot products and the epilogue in one kernel."""

# Kernels are written in Triton's language, whose values and launches have no Python types.
# pyright: basic, reportMissingParameterType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.activation import activation_function
from fxopt.kernels.linear_w8a8.reference import check_linear, check_scale

__all__ = ["CONFIGS", "ODD_CONFIG", "Config", "launch", "linear_w8a8_kernel", "select_config"]


@dataclass(frozen=True)
class Config:
    """Tile sizes for products of up to `max_m` rows."""

    max_m: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Few rows read the weight once and want deep pipelines; many rows want large tiles. None spills
# on the targets of the compile-only tests.
CONFIGS = (
    Config(max_m=16, block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    Config(max_m=64, block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
    Config(max_m=512, block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    Config(max_m=1 << 62, block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
)
# Rows that do not start on 16 bytes are loaded byte by byte, whose addresses fill the registers.
ODD_CONFIG = Config(max_m=1 << 62, block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=2)
GROUP_M = 8


def select_config(m: int, k: int) -> Config:
    """The tile sizes for `m` rows of `k` bytes."""
    if k % 16 != 0:
        return ODD_CONFIG
    return next(config for config in CONFIGS if m <= config.max_m)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, which a maximum may drop
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2.0 * u)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "quick_gelu":
        y = y * tl.sigmoid(1.702 * y)
    return y


@triton.jit
def linear_w8a8_kernel(
    q,
    scale,
    zero_point,
    weight,
    weight_scale,
    weight_sum,
    bias,
    y,
    M,
    N,
    K,
    stride_q,
    scale_step,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the integer linear layer.

    y = activation(scale * weight_scale * (q @ weight.T - zero_point * weight_sum) + bias)

    q [M, K] int8 with rows `stride_q` apart; weight [N, K] int8; scale and zero_point [M], or [1]
    with scale_step 0; weight_scale, weight_sum, bias [N]; y [M, N].

    Programs go down GROUP_M rows of tiles before the next column, which reuses the weight in L2.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_rows
    tile_n = (pid % (GROUP_M * tiles_n)) // group_rows

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    p_q = q + m[:, None] * stride_q
    p_w = weight + n[None, :] * K
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_q = tl.load(p_q + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0)
        b_w = tl.load(p_w + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0)
        b_acc = tl.dot(b_q, b_w, b_acc, out_dtype=tl.int32)

    if HAS_ZERO_POINT:
        b_zero = tl.load(zero_point + m * scale_step, mask=m < M, other=0)
        b_sum = tl.load(weight_sum + n, mask=n < N, other=0)
        b_acc -= b_zero[:, None] * b_sum[None, :]
    b_scale = tl.load(scale + m * scale_step, mask=m < M, other=0.0)
    b_weight_scale = tl.load(weight_scale + n, mask=n < N, other=0.0)
    b_y = b_acc.to(tl.float32) * (b_scale[:, None] * b_weight_scale[None, :])
    if HAS_BIAS:
        b_y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    b_y = _activate(b_y, ACTIVATION)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], b_y.to(y.dtype.element_ty), mask=mask)


def launch(
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
    """Integer linear layer on q [..., K] and weight [N, K]; y [..., N] of `dtype`."""
    check_linear(q, scale, zero_point, weight, weight_scale, weight_sum, bias, dtype)
    check_scale(q, scale, zero_point)
    activation_function(activation)
    n, k = weight.shape
    y = torch.empty((*q.shape[:-1], n), dtype=dtype, device=q.device)
    if y.numel() == 0:
        return y
    rows = q.reshape(y.numel() // n, k)
    if k > 0 and rows.stride(1) != 1:
        rows = rows.contiguous()
    m = rows.size(0)
    config = select_config(m, k)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    # Pointers that a flag switches off still need a tensor; scale stands in.
    absent = scale
    with torch.cuda.device_of(q):
        linear_w8a8_kernel[grid](
            rows,
            scale.contiguous(),
            absent if zero_point is None else zero_point.contiguous(),
            weight.contiguous(),
            weight_scale.contiguous(),
            absent if weight_sum is None else weight_sum.contiguous(),
            absent if bias is None else bias.contiguous(),
            y,
            m,
            n,
            k,
            rows.stride(0),
            0 if scale.numel() == 1 else 1,
            HAS_ZERO_POINT=zero_point is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return y
