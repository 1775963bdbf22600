"""fxopt::choose_qparams, quantize and dequantize on blocks of any shape.

A block is the part of a tensor that shares one scale. Block shapes cover every granularity:
the whole tensor (-1, -1), one channel (1, -1), a group (1, g), one token (1, ..., 1, -1). A
floating dtype (fp8) is cast to, which rounds to its own nearest number.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.ir.operators.registration import define


def block_counts(shape: Any, block: Any) -> list[Any]:
    """How many blocks lie along each axis; -1 in a block means the whole axis."""
    return [1 if size == -1 else length // size for length, size in zip(shape, block, strict=True)]


def check_blocks(x: Tensor, block: Any) -> None:
    """Refuse a block that has another number of axes, or does not divide the tensor."""
    if len(block) != x.dim():
        raise KernelError(
            f"block {list(block)} has {len(block)} axes, the tensor {list(x.shape)} has {x.dim()}."
        )
    for length, size in zip(x.shape, block, strict=True):
        if size != -1 and length % size:
            raise KernelError(
                f"block {list(block)} does not divide the tensor {list(x.shape)}; choose a group "
                f"size that divides {length}."
            )


def _blocked(x: Tensor, block: Any) -> tuple[Tensor, list[int]]:
    shape: list[int] = []
    counts = block_counts(x.shape, block)
    for count, length, size in zip(counts, x.shape, block, strict=True):
        shape += [count, length if size == -1 else size]
    return x.reshape(shape), list(range(1, 2 * x.dim(), 2))


def _spread(parameter: Tensor, x: Tensor, block: Any) -> Tensor:
    """Repeat a per-block parameter so that it broadcasts against the blocked view of `x`."""
    counts = block_counts(x.shape, block)
    return parameter.reshape([size for count in counts for size in (count, 1)])


def _choose_qparams(
    x: Tensor, block: Any, symmetric: bool, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    check_blocks(x, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        counts = block_counts(x.shape, block)
        return x.new_ones(counts, dtype=compute), x.new_zeros(counts, dtype=torch.int32)
    blocked, axes = _blocked(x.detach().to(compute), block)
    counts = block_counts(x.shape, block)
    # A scale is at least the smallest normal number: a block of zeros stays exact and finite, and a
    # denormal scale would have too few bits for its block to stay within the range.
    least = torch.finfo(torch.float32).tiny
    if symmetric:
        reach = blocked.abs().amax(axes)
        scale = (reach / ((quant_max - quant_min) / 2)).clamp(min=least)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        low = blocked.amin(axes).clamp(max=0)
        high = blocked.amax(axes).clamp(min=0)
        scale = ((high - low) / (quant_max - quant_min)).clamp(min=least)
        zero_point = (quant_min - torch.round(low / scale)).to(torch.int32)
    return scale.reshape(counts), zero_point.reshape(counts)


def _choose_qparams_fake(x: Tensor, block: Any, *_: Any) -> tuple[Tensor, Tensor]:
    counts = block_counts(x.shape, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(counts, dtype=compute), x.new_empty(counts, dtype=torch.int32)


define(
    "choose_qparams(Tensor x, SymInt[] block, bool symmetric, int quant_min, int quant_max) "
    "-> (Tensor, Tensor)",
    _choose_qparams,
    _choose_qparams_fake,
)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Any,
    dtype: torch.dtype,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    check_blocks(x, block)
    blocked, _ = _blocked(x.to(scale.dtype), block)
    q = blocked / _spread(scale, x, block)
    if not dtype.is_floating_point:
        q = torch.round(q)
    if zero_point is not None:
        q = q + _spread(zero_point, x, block)
    return q.clamp(quant_min, quant_max).to(dtype).reshape(x.shape)


def _quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Any, dtype: torch.dtype, *_: int
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, ScalarType dtype, "
    "int quant_min, int quant_max) -> Tensor",
    _quantize,
    _quantize_fake,
)


def _dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Any, dtype: torch.dtype
) -> Tensor:
    blocked, _ = _blocked(q, block)
    centred = blocked.to(scale.dtype)
    if zero_point is not None:
        centred = centred - _spread(zero_point, q, block)
    spread = _spread(scale, q, block)
    # In place where no gradient needs the factors: a weight in floating point is large.
    own = not (scale.requires_grad or q.is_floating_point())
    dense = centred.mul_(spread) if own else centred * spread
    return dense.to(dtype).reshape(q.shape)


def _dequantize_fake(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Any, dtype: torch.dtype
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


define(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, SymInt[] block, ScalarType dtype) "
    "-> Tensor",
    _dequantize,
    _dequantize_fake,
)
