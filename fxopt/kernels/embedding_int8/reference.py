"""fxopt::embedding_int8: rows of an int8 table, dequantized.

    y[i] = scale[indices[i]] * weight[indices[i]]

Shapes:
    weight [V, D] int8; scale [V] float32; indices [...] int64 or int32 -> y [..., D] of `dtype`.

Raises:
    IndexError: An index is negative or not below V (on a GPU: a device assertion).
"""

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["embedding_int8"]


def _check(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    check_floating(dtype, "dtype")
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise KernelError(f"weight must be int8 [V, D], got {weight.dtype} {list(weight.shape)}")
    if scale.dtype != torch.float32 or scale.numel() != weight.size(0):
        raise KernelError(
            f"scale must be float32 with V = {weight.size(0)} elements, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise KernelError(f"indices must be int64 or int32, got {indices.dtype}")


@register_reference(
    "embedding_int8(Tensor weight, Tensor scale, Tensor indices, ScalarType dtype) -> Tensor"
)
def embedding_int8(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up and dequantize rows; see the module's equation."""
    _check(weight, scale, indices, dtype)
    rows = functional.embedding(indices, weight).to(torch.float32)
    scales = functional.embedding(indices, scale.reshape(-1, 1))
    return (rows * scales).to(dtype).contiguous()


@register_fake("embedding_int8")
def _(weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    _check(weight, scale, indices, dtype)
    return weight.new_empty((*indices.shape, weight.size(1)), dtype=dtype)
