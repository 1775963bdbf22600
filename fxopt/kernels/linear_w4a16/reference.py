"""fxopt::linear_w4a16: a linear layer with 4-bit codes for weights, read through a table.

    w[n, k] = scale[n, g] * (table[code[n, k]] - zero_point[n, g]),    g = k // (K / G)
    w[n, outlier_column[i]] += outlier_value[i]    for outlier_start[n] <= i < outlier_start[n + 1]
    y = activation(x @ w.T + bias)

Two's complement is the table 0, 1, ... 7, -8, ... -1; nf4 and learned codebooks bring their own.

Shapes:
    x [..., K] floating; codes [N, ceil(K / 2)] uint8, the lower four bits first; scale [N, G]
    float32 with K divisible by G; zero_point [N, G] int8, or None; bias [N], or None; activation
    one of fxopt.kernels.ACTIVATIONS; table [16] float32; outlier_start [N + 1] int32, rising from
    0, outlier_column (below K) and outlier_value [outliers] int32 and float32, or all None
    -> y [..., N] of x's dtype.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import check_bias, check_floating, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["linear_w4a16"]

CODES = 16


def _check_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor, k: int
) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.size(1) != (k + 1) // 2:
        raise KernelError(
            f"codes must be uint8 [N, {(k + 1) // 2}] for K = {k}, got {codes.dtype} "
            f"{list(codes.shape)}"
        )
    if table.dtype != torch.float32 or table.numel() != CODES:
        raise KernelError(
            f"table must be float32 with {CODES} values, got {table.dtype} {list(table.shape)}"
        )
    n = codes.size(0)
    fits = scale.dim() == 2 and scale.size(0) == n and scale.size(1) > 0
    if scale.dtype != torch.float32 or not fits or k % scale.size(1):
        raise KernelError(
            f"scale must be float32 [{n}, G] with G a divisor of K = {k}, got {scale.dtype} "
            f"{list(scale.shape)}"
        )
    if zero_point is None:
        return
    if zero_point.dtype != torch.int8 or zero_point.shape != scale.shape:
        raise KernelError(
            f"zero_point must be int8 {list(scale.shape)}, got {zero_point.dtype} "
            f"{list(zero_point.shape)}"
        )


def _check_outliers(
    start: Tensor | None, column: Tensor | None, value: Tensor | None, n: int
) -> None:
    if start is None and column is None and value is None:
        return
    if start is None or column is None or value is None:
        raise KernelError(
            "outlier_start, outlier_column and outlier_value come together or not at all"
        )
    if start.dtype != torch.int32 or start.numel() != n + 1:
        raise KernelError(
            f"outlier_start must be int32 with N + 1 = {n + 1} elements, got {start.dtype} "
            f"{list(start.shape)}"
        )
    same = column.numel() == value.numel()
    if column.dtype != torch.int32 or value.dtype != torch.float32 or not same:
        raise KernelError(
            "outlier_column must be int32 and outlier_value float32 of one size, got "
            f"{column.dtype} {list(column.shape)} and {value.dtype} {list(value.shape)}"
        )


def _check_places(start: Tensor, column: Tensor, k: int) -> None:
    # Not in `_check_outliers`: a fake tensor has no values.
    count = column.numel()
    bounds = start.flatten()
    if int(bounds[0]) != 0 or int(bounds[-1]) != count or bool((bounds.diff() < 0).any()):
        raise KernelError(f"outlier_start must rise from 0 to the number of outliers, {count}")
    if bool(((column < 0) | (column >= k)).any()):
        raise KernelError(f"outlier_column must lie in [0, K) with K = {k}")


@register_reference(
    "linear_w4a16(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "str activation, Tensor table, Tensor? outlier_start, Tensor? outlier_column, "
    "Tensor? outlier_value) -> Tensor"
)
def linear_w4a16(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str,
    table: Tensor,
    outlier_start: Tensor | None = None,
    outlier_column: Tensor | None = None,
    outlier_value: Tensor | None = None,
) -> Tensor:
    """Linear layer with 4-bit weights; see the module's equation."""
    if x.dim() < 1:
        raise KernelError("linear_w4a16 needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    dtype, k, n = compute_dtype(x), x.size(-1), codes.size(0)
    _check_codes(codes, scale, zero_point, table, k)
    _check_outliers(outlier_start, outlier_column, outlier_value, n)
    check_bias(bias, n)
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :k]
    groups = scale.size(1)
    values = table[pairs.long()].unflatten(1, (groups, k // groups))
    if zero_point is not None:
        values = values - zero_point[..., None]
    weight = (values * scale[..., None]).flatten(1).to(dtype)
    if outlier_start is not None and outlier_column is not None and outlier_value is not None:
        _check_places(outlier_start, outlier_column, k)
        rows = torch.repeat_interleave(torch.arange(n, device=x.device), outlier_start.diff())
        places = (rows, outlier_column.long())
        weight = weight.index_put(places, outlier_value.to(dtype), accumulate=True)
    y = x.to(dtype) @ weight.T
    if bias is not None:
        y = y + bias
    return activation_function(activation)(y).to(x.dtype).contiguous()


@register_fake("linear_w4a16")
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str,
    table: Tensor,
    outlier_start: Tensor | None,
    outlier_column: Tensor | None,
    outlier_value: Tensor | None,
) -> Tensor:
    check_floating(x.dtype, "x")
    _check_codes(codes, scale, zero_point, table, x.size(-1))
    _check_outliers(outlier_start, outlier_column, outlier_value, codes.size(0))
    check_bias(bias, codes.size(0))
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], codes.size(0)))
