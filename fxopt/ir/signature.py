"""Signature: what a program takes, what it returns, and which dimensions may vary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxopt.errors import InputError, LoadError
from fxopt.ir.state_form import DENSE, StateForm
from fxopt.ir.structure import Structure

_Item = TypeVar("_Item")
Dimension = int | str  # a number is fixed; a name or an expression of names varies


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a program's inputs or outputs."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: torch.dtype

    def empty(self, batch: int, device: torch.device) -> Tensor:
        """A tensor of so many rows in which every other size that varies is zero."""
        sizes = (size if isinstance(size, int) else 0 for size in self.shape[1:])
        return torch.empty(batch, *sizes, dtype=self.dtype, device=device)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        return {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype)[6:]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "TensorSpec":
        """The inverse of `to_dict`."""
        return TensorSpec(data["name"], tuple(data["shape"]), getattr(torch, data["dtype"]))


@dataclass(frozen=True)
class SizeRange:
    """The sizes of a dimension, or of a sum of dimensions, at which the graph is the model.

    Attributes:
        low: the lowest such size.
        high: the highest, or None if there is none.
    """

    low: int = 0
    high: int | None = None

    def size(self, name: str, sizes: Mapping[str, int]) -> int | None:
        """The size of what is called "past" or "past + sequence"; None where it is not known."""
        terms = name.split(" + ")
        return sum(sizes[term] for term in terms) if all(t in sizes for t in terms) else None

    def check(self, name: str, sizes: Mapping[str, int]) -> None:
        """Refuse a size out of range.

        Raises:
            InputError: it is; the message says the range and what to do.
        """
        size = self.size(name, sizes)
        if size is None or (self.low <= size and (self.high is None or size <= self.high)):
            return
        limits = f"from {self.low} " if self.low else ""
        limits += f"up to {self.high}" if self.high is not None else "upward"
        raise InputError(
            f"{name} is {size}; the program was captured for sizes {limits}, out of which the "
            "model's Python code takes another path (a branch or loop over the size, a table that "
            "ends). Stay in range, or capture a plain module from example_inputs of that size."
        )


@dataclass(frozen=True)
class CacheSpec:
    """The key/value cache of a decoder: state that the graph takes and gives back.

    The last `count` graph inputs and outputs are the keys and the values of each layer in turn.
    Each of these `2 * layers` states is held in the tensors that its form says; a dense one is
    one tensor [batch, heads, length, head_dim].

    Attributes:
        layers: how many layers have keys and values of their own.
        forms: the form of each state; empty where all are dense.
    """

    layers: int
    forms: tuple[StateForm, ...] = ()

    @property
    def states(self) -> tuple[StateForm, ...]:
        """The form of each state: keys and values of each layer in turn."""
        return self.forms or (DENSE,) * (2 * self.layers)

    @property
    def count(self) -> int:
        """How many tensors hold the cache."""
        return sum(len(form.parts) for form in self.states)

    def split(self, tensors: Sequence[_Item]) -> list[list[_Item]]:
        """The last `count` of some flat inputs or outputs, or of what stands for them, by state."""
        rest = list(tensors[len(tensors) - self.count :])
        return [[rest.pop(0) for _ in form.parts] for form in self.states]

    def length(self, tensors: Sequence[Tensor]) -> int:
        """How many tokens the cache holds."""
        return self.states[0].length(self.split(tensors)[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        forms = [form.to_dict() for form in self.forms]
        return {"layers": self.layers, **({"forms": forms} if forms else {})}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "CacheSpec":
        """The inverse of `to_dict`.

        Raises:
            LoadError: the forms are not one for each state.
        """
        forms = tuple(StateForm.from_dict(form) for form in data.get("forms", ()))
        if len(forms) not in (0, 2 * data["layers"]):
            raise LoadError(
                f"the cache has {data['layers']} layers and {len(forms)} forms; the folder is "
                "damaged. Save the model again."
            )
        return CacheSpec(data["layers"], forms)


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
        ranges: where they are limited, the sizes of named dimensions and of sums of them
            ("past + sequence") at which the graph is the model.
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
    ranges: Mapping[str, SizeRange] = field(default_factory=dict[str, SizeRange])

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
            "ranges": {name: [limit.low, limit.high] for name, limit in self.ranges.items()},
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
            cache=CacheSpec.from_dict(data["cache"]) if data["cache"] else None,
            step_inputs=tuple(data["step_inputs"]),
            ignored=tuple(data["ignored"]),
            parameters=tuple(data["parameters"]),
            # A folder that was stored before there were ranges has none.
            ranges={name: SizeRange(*limit) for name, limit in data.get("ranges", {}).items()},
        )

    def empty_state(self, batch: int, device: torch.device) -> list[list[Tensor]]:
        """A cache without tokens, by state: every size that varies is zero, the batch aside."""
        assert self.cache is not None  # noqa: S101 - callers ask only programs with a cache
        return [
            [spec.empty(batch, device) for spec in specs] for specs in self.cache.split(self.inputs)
        ]

    def hold(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat inputs whose keys and values are dense, as this program holds them.

        Those that are in its form already stay as they are.
        """
        cache = self.cache
        if cache is None or len(tensors) == len(self.inputs):
            return list(tensors)
        dense = tensors[len(tensors) - 2 * cache.layers :]
        empty = self.empty_state(dense[0].shape[0], dense[0].device)
        held = [
            form.append(state, value)
            for form, state, value in zip(cache.states, empty, dense, strict=True)
        ]
        return [*tensors[: -len(dense)], *(tensor for state in held for tensor in state)]

    def check(self, tensors: list[Tensor]) -> None:
        """Refuse tensors that the graph was not captured for.

        Raises:
            InputError: a rank, a dtype or a fixed dimension differs, two inputs that share a
                dimension disagree about it, or a size is out of its range.
        """
        sizes = self.sizes(tensors)
        for name, limit in self.ranges.items():
            limit.check(name, sizes)

    def accepts(self, tensors: list[Tensor]) -> bool:
        """Whether `check` lets them through."""
        try:
            self.check(tensors)
        except InputError:
            return False
        return True

    def sizes(self, tensors: list[Tensor]) -> dict[str, int]:
        """The size of every named dimension.

        Raises:
            InputError: as `check`, ranges aside.
        """
        return check_tensors(self.inputs, tensors)


def check_tensors(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Refuse tensors that do not fit their specs, or each other; the sizes of named dimensions."""
    bound: dict[str, tuple[int, str]] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
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
    return {name: size for name, (size, _) in bound.items()}


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
