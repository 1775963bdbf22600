"""Signature: what a program takes, what it returns, and which dimensions may vary."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InputError
from fxopt.ir.structure import Structure

Dimension = int | str  # a number is fixed; a name or an expression of names varies


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a program's inputs or outputs."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: torch.dtype

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        return {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype)[6:]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "TensorSpec":
        """The inverse of `to_dict`."""
        return TensorSpec(data["name"], tuple(data["shape"]), getattr(torch, data["dtype"]))


@dataclass(frozen=True)
class CacheSpec:
    """The key/value cache of a decoder: state that the graph takes and gives back.

    The last `2 * layers` graph inputs and outputs are key and value of each layer, shape
    [batch, heads, length, head_dim].
    """

    layers: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        return {"layers": self.layers}


@dataclass(frozen=True)
class Signature:
    """The calling convention of a program.

    Attributes:
        inputs: one spec per graph input, in order; the cache's tensors come last.
        outputs: one spec per graph output, in order; the cache's tensors come last.
        input_structure: how positional and keyword arguments map to `inputs`.
        output_structure: how `outputs` become the model's own result.
        defaults: what an omitted input means: "ones", "zeros" or "arange", proven at capture.
        cache: the key/value cache, if the program has one.
        step_inputs: names of inputs that change at each generated token; the others are read
            once (the encoder's side of an encoder-decoder). Empty for everything else.
        ignored: names of inputs that the model accepts and never reads; so does the program.
        parameters: the names of the model's own `forward` parameters, in order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: Structure
    output_structure: Structure
    defaults: Mapping[str, str] = field(default_factory=dict[str, str])
    cache: CacheSpec | None = None
    step_inputs: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        return {
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "input_structure": self.input_structure,
            "output_structure": self.output_structure,
            "defaults": dict(self.defaults),
            "cache": self.cache.to_dict() if self.cache else None,
            "step_inputs": list(self.step_inputs),
            "ignored": list(self.ignored),
            "parameters": list(self.parameters),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Signature":
        """The inverse of `to_dict`."""
        return Signature(
            inputs=tuple(TensorSpec.from_dict(spec) for spec in data["inputs"]),
            outputs=tuple(TensorSpec.from_dict(spec) for spec in data["outputs"]),
            input_structure=data["input_structure"],
            output_structure=data["output_structure"],
            defaults=data["defaults"],
            cache=CacheSpec(**data["cache"]) if data["cache"] else None,
            step_inputs=tuple(data["step_inputs"]),
            ignored=tuple(data["ignored"]),
            parameters=tuple(data["parameters"]),
        )

    def check(self, tensors: list[Tensor]) -> None:
        """Refuse tensors that the graph was not captured for.

        Raises:
            InputError: a rank, a dtype or a fixed dimension differs, or two inputs that share a
                dimension disagree about it.
        """
        bound: dict[str, tuple[int, str]] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.dim() != len(spec.shape):
                raise InputError(
                    f"input {spec.name!r} has shape {list(tensor.shape)}; the program takes "
                    f"{list(spec.shape)}."
                )
            if tensor.dtype != spec.dtype:
                raise InputError(
                    f"input {spec.name!r} is {tensor.dtype}; the program takes {spec.dtype}. "
                    f"Convert it with .to({spec.dtype})."
                )
            for axis, (expected, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
                _check_dimension(spec, axis, expected, size, bound)


def _check_dimension(
    spec: TensorSpec, axis: int, expected: Dimension, size: int, bound: dict[str, tuple[int, str]]
) -> None:
    if isinstance(expected, int):
        if size != expected:
            raise InputError(
                f"dimension {axis} of input {spec.name!r} is {size}; the program was captured "
                f"with {expected} fixed there."
            )
    elif expected.isidentifier():
        known, owner = bound.setdefault(expected, (size, spec.name))
        if known != size:
            raise InputError(
                f"dimension {axis} of input {spec.name!r} ({expected}) is {size}, but input "
                f"{owner!r} says {known}."
            )


def default_tensor(
    default: str, batch: int, columns: int, first: int, device: torch.device
) -> Tensor:
    """The integer tensor [batch, columns] that a default stands for."""
    if default == "ones":
        return torch.ones(batch, columns, dtype=torch.long, device=device)
    if default == "zeros":
        return torch.zeros(batch, columns, dtype=torch.long, device=device)
    row = torch.arange(first, first + columns, device=device)
    return row.expand(batch, columns).contiguous()
