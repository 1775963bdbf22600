"""What the Python implementations require of their arguments; cpu.cpp files check the same."""

import torch
from torch import Tensor

from fxopt.errors import KernelError

__all__ = [
    "check_bias",
    "check_experts",
    "check_floating",
    "check_int8_weight",
    "check_pre_scale",
    "check_same",
    "check_weight_sum",
    "compute_dtype",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def check_floating(dtype: torch.dtype, what: str) -> None:
    """Raise a KernelError unless `dtype` is one that the kernels read and write."""
    if dtype not in FLOATING:
        got = str(dtype).removeprefix("torch.")
        raise KernelError(f"{what} must be float32, bfloat16, float16 or float64, got {got}")


def check_int8_weight(weight: Tensor, scale: Tensor, bias: Tensor | None, k: int) -> None:
    """Raise a KernelError unless weight is int8 [N, k], scale float32 [N] and bias [N]."""
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise KernelError(f"weight must be int8 [N, K], got {_describe(weight)}")
    n = weight.size(0)
    if weight.size(1) != k:
        raise KernelError(f"weight is {list(weight.shape)}, but the input has K = {k}")
    if scale.dtype != torch.float32 or scale.numel() != n:
        raise KernelError(
            f"weight_scale must be float32 with N = {n} elements, got {_describe(scale)}"
        )
    check_bias(bias, n)


def check_bias(bias: Tensor | None, n: int) -> None:
    """Raise a KernelError unless bias is None or floating [n]."""
    if bias is None:
        return
    if bias.numel() != n:
        raise KernelError(f"bias must have N = {n} elements, got {list(bias.shape)}")
    check_floating(bias.dtype, "bias")


def check_experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raise a KernelError unless x is [T, K], both routings [T, k], and as many experts twice."""
    check_floating(x.dtype, "x")
    if x.dim() != 2 or index.dim() != 2 or index.shape != weight.shape or len(index) != len(x):
        raise KernelError(
            f"a mixture needs x [T, K] and two routings [T, k], got {_describe(x)}, "
            f"{_describe(index)} and {_describe(weight)}"
        )
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.size(0) != down.size(0):
        raise KernelError(
            f"a mixture needs weights [E, out, in], got {_describe(gate_up)} and {_describe(down)}"
        )


def check_weight_sum(weight_sum: Tensor | None, weight: Tensor) -> None:
    """Raise a KernelError unless weight_sum is None or int32 [N]."""
    n = weight.size(0)
    if weight_sum is not None and (weight_sum.dtype != torch.int32 or weight_sum.numel() != n):
        raise KernelError(
            f"weight_sum must be int32 with N = {n} elements, the row sums of weight, "
            f"got {_describe(weight_sum)}"
        )


def check_pre_scale(pre_scale: Tensor | None, k: int, what: str = "pre_scale") -> None:
    """Raise a KernelError unless the scale is None or floating [k]."""
    if pre_scale is None:
        return
    if pre_scale.numel() != k:
        raise KernelError(f"{what} must have {k} elements, got {list(pre_scale.shape)}")
    check_floating(pre_scale.dtype, what)


def check_same(a: Tensor, b: Tensor, what: str) -> None:
    """Raise a KernelError unless the two tensors have one shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise KernelError(
            f"{what} must have one shape and dtype, got {_describe(a)} and {_describe(b)}"
        )
