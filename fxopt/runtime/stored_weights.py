"""Weights as a safetensors file: every tensor once, bit for bit, with its memory order."""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxopt.errors import LoadError, SaveError
from fxopt.ir.program import Program
from fxopt.runtime.stored_arguments import DTYPES


class StoredWeight(BaseModel):
    """What the graph file says of one weight.

    Attributes:
        dtype: the dtype's name in torch.
        shape: the shape that the graph sees.
        order: the axes from slowest to fastest, where that is not 0, 1, 2, ...; the file holds
            the tensor in this order, and it comes back with the same strides.
        same_as: another weight of which this one is the same tensor.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[int]
    order: list[int] | None = None
    same_as: str | None = None


def write_weights(path: Path, program: Program) -> dict[str, StoredWeight]:
    """Write every weight of a program; returns the table for the graph file.

    Raises:
        SaveError: a weight holds no data, or is of a kind that safetensors does not know.
    """
    table: dict[str, StoredWeight] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    written: set[int] = set()
    for name, tensor in program.weights().items():
        _check_storable(name, tensor)
        key = _identity(tensor)
        stored = StoredWeight(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape)
        )
        table[name] = stored
        if key in first:
            stored.same_as = first[key]
            continue
        first[key] = name
        stored.order = _memory_order(tensor)
        flat = _flat_copy(tensor, stored.order)
        memory = flat.untyped_storage().data_ptr()
        # Two views of one storage, each as large as it, would be one tensor to safetensors.
        tensors[name] = flat.clone() if flat.numel() and memory in written else flat
        written.add(memory)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise SaveError(f"the weights cannot be written as safetensors: {error}") from error
    return table


def read_weights(path: Path, table: dict[str, StoredWeight]) -> dict[str, Tensor]:
    """Read the weights that a graph file lists.

    Raises:
        LoadError: the file is not safetensors, or does not hold what the graph file says.
    """
    try:
        # Copies: the file may be replaced while the model is in use.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except Exception as error:  # whatever the parser of a damaged file raises
        raise LoadError(
            f"{path.name} is not a safetensors file ({error}); save the model again."
        ) from error
    owners = {name for name, stored in table.items() if stored.same_as is None}
    if owners != set(tensors):
        missing, foreign = sorted(owners - set(tensors)), sorted(set(tensors) - owners)
        raise LoadError(
            f"{path.name} and graph.json disagree: missing weights {missing[:5]}, unknown weights "
            f"{foreign[:5]}. The two files are not of one model; save it again."
        )
    for name in owners:
        tensors[name] = _restore(name, tensors[name], table[name])
    for name, stored in table.items():
        if stored.same_as is not None:
            if stored.same_as not in owners:
                raise LoadError(
                    f"weight {name!r} is said to be {stored.same_as!r}, which is not stored; the "
                    "folder is damaged. Save the model again."
                )
            tensors[name] = tensors[stored.same_as]
            _check(name, tensors[name], stored)
    return tensors


def _check_storable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise SaveError(
            f"weight {name!r} is on the meta device and holds no data. Load the model's weights "
            "before saving."
        )
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise SaveError(
            f"weight {name!r} is a {type(tensor).__name__} of layout {tensor.layout}; only plain "
            "strided tensors can be stored. Convert it first, for instance with .to_dense()."
        )


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The axes in the order in which they lie in memory; None for the usual one."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    return order if tensor.permute(order).is_contiguous() else None


def _flat_copy(tensor: Tensor, order: list[int] | None) -> Tensor:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg()
    if order is not None:
        flat = flat.permute(order)
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    # safetensors refuses tensors that share memory; views of one storage are written apart.
    whole = flat.numel() * flat.element_size() == flat.untyped_storage().nbytes()
    return flat if flat.is_contiguous() and whole else flat.contiguous().clone()


def _restore(name: str, tensor: Tensor, stored: StoredWeight) -> Tensor:
    dtype = DTYPES.get(stored.dtype)
    if dtype is not None and dtype.is_complex and tensor.dim() and tensor.shape[-1] == 2:
        tensor = torch.view_as_complex(tensor)
    if stored.order is not None:
        if sorted(stored.order) != list(range(tensor.dim())):
            raise LoadError(
                f"weight {name!r} has {tensor.dim()} axes and cannot lie in the order "
                f"{stored.order}; the folder is damaged. Save the model again."
            )
        inverse = sorted(range(tensor.dim()), key=stored.order.__getitem__)
        tensor = tensor.permute(inverse)
    _check(name, tensor, stored)
    return tensor


def _check(name: str, tensor: Tensor, stored: StoredWeight) -> None:
    if list(tensor.shape) != stored.shape or str(tensor.dtype) != f"torch.{stored.dtype}":
        raise LoadError(
            f"weight {name!r} is {tensor.dtype} {list(tensor.shape)}; the graph needs "
            f"torch.{stored.dtype} {stored.shape}. The files are not of one model; save it again."
        )
