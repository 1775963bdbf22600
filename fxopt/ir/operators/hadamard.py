"""fxopt::hadamard: rotate the last axis, in blocks, by a normalized Hadamard matrix."""

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.ir.hadamard import hadamard_base, hadamard_factors
from fxopt.ir.operators.registration import define


def _factors(x: Tensor, order: int) -> tuple[int, int]:
    """The factors (2^k, m) of the order, once x is known to fit it."""
    factors = hadamard_factors(order)
    if factors is None:
        raise KernelError(
            f"fxopt::hadamard was called with order {order}; there is no Hadamard matrix of that "
            "order here. Use an order that fxopt.ir.hadamard.supported_order accepts and that "
            "divides the last axis."
        )
    if not x.is_floating_point():
        raise KernelError(f"fxopt::hadamard was called on {x.dtype}; give it floating point.")
    if x.dim() == 0 or x.shape[-1] % order:
        raise KernelError(
            f"fxopt::hadamard was called with order {order} on a tensor {list(x.shape)}; choose an "
            "order that divides its last axis."
        )
    return factors


def hadamard_reference(x: Tensor, order: int) -> Tensor:
    """Multiply each block of the last axis by H = (S x B) / sqrt(order): y = x H.

    Butterflies for Sylvester's part S of order 2^k, a small matmul for the base B of order m, at
    least in float32.

    Shapes: x [..., n] -> [..., n], contiguous; the order divides n.

    Raises:
        KernelError: no matrix of that order is known, or it does not divide n.

    Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024,
        arXiv:2404.00456.
    """
    power, base = _factors(x, order)
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // order
    y = x.to(compute).reshape(rows, order)
    stride = base
    while stride < order:
        first, second = y.reshape(rows, order // (2 * stride), 2, stride).unbind(2)
        y = torch.stack((first + second, first - second), 2)
        stride *= 2
    if base > 1:
        matrix = hadamard_base(base).to(device=x.device, dtype=compute)
        y = y.reshape(rows * power, base) @ matrix
    return (y * order**-0.5).to(x.dtype).reshape(x.shape).contiguous()


def _hadamard_fake(x: Tensor, order: int) -> Any:
    _factors(x, order)
    return x.new_empty(x.shape)


define("hadamard(Tensor x, int order) -> Tensor", hadamard_reference, _hadamard_fake)
