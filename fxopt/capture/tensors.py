"""Small operations on the tensors that go into and come out of a model."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxopt.errors import InputError
from fxopt.ir.cache_names import CACHE_NAMES


def output_tensors(value: Any) -> list[Tensor]:
    """Every tensor in a model's result, in order; caches are left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [
            tensor
            for key, item in value.items()
            if key not in CACHE_NAMES
            for tensor in output_tensors(item)
        ]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in output_tensors(item)]
    return []


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def same_tensors(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal up to the order of floating-point operations."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest distance between two entries; where both are the same infinity there is none."""
    apart = [
        torch.where(x == y, 0, x.double() - y.double()).abs().max()
        for x, y in zip(a, b, strict=True)
        if x.numel()
    ]
    return max((float(value) for value in apart), default=0.0)


def take_cyclic(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor at another size along one axis, its entries repeated in order."""
    index = torch.arange(size, device=tensor.device) % max(tensor.shape[axis], 1)
    return tensor.detach().index_select(axis, index)


def keyword_tensors(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]):
    """Bind example inputs to the parameter names of the model's forward.

    Raises:
        InputError: an example is not a tensor, or there are more than forward takes.
    """
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(
            f"example_inputs do not fit the forward of {type(model).__name__}: {error}. Pass a "
            "dict of keyword arguments."
        ) from error
    extra = bound.pop("kwargs", {})
    tensors = {**bound, **extra}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"example input {name!r} is a {type(value).__name__}; HF models are captured on "
                "tensors. Leave flags out; caches are found by themselves."
            )
    return tensors
