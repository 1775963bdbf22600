"""The activations that a kernel's epilogue knows."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.errors import KernelError

__all__ = ["ACTIVATIONS", "activation_function"]


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": functional.silu,
    "quick_gelu": _quick_gelu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`.

    Raises:
        KernelError: There is none; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise KernelError(f"unknown activation '{name}'; valid: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
