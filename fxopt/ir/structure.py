"""Nested inputs and outputs as plain data plus a flat list of tensors.

A structure is JSON: it can be stored beside the weights and rebuilt without importing the
model's code. Classes of HF `ModelOutput`s and of named tuples are kept by name. In the process that
captured a model the name still knows its class; after loading, those that transformers and torch do
not hold come back as a class of the same name and fields.
"""

import collections
import dataclasses
from types import MemberDescriptorType
from typing import Any, Self

import torch
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from fxopt.errors import CaptureError, LoadError

Structure = dict[str, Any]
_MADE: dict[tuple[str, str, tuple[str, ...]], type[Any]] = {}  # one class for all loaded models


class _ClassName(str):
    """A class by its name, the class itself at hand: another model's may have the same name."""

    __slots__ = ("known",)

    def __new__(cls, known: type[Any]) -> Self:
        name = super().__new__(cls, known.__name__)
        name.known = known
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return _ClassName, (self.known,)


def flatten(value: Any, leaves: list[Any], where: str = "value") -> Structure:
    """Split nested data into a structure; tensors are appended to `leaves`.

    Raises:
        CaptureError: a container that cannot be stored as plain data.
    """
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return {"kind": "tensor", "index": len(leaves) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"kind": "constant", "value": value}
    named = dict(value) if isinstance(value, ModelOutput) else _named_items(value)
    if named is not None:
        kind = "model_output" if isinstance(value, ModelOutput) else "named_tuple"
        fields = {key: flatten(item, leaves, f"{where}.{key}") for key, item in named.items()}
        return {"kind": kind, "class": _ClassName(type(value)), "fields": fields}
    if isinstance(value, dict):
        items = [[k, flatten(item, leaves, f"{where}[{k!r}]")] for k, item in value.items()]
        return {"kind": "dict", "items": items}
    if type(value) in (list, tuple):
        items = [flatten(item, leaves, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"kind": type(value).__name__, "items": items}
    raise CaptureError(
        f"{where} is a {type(value).__name__}. Inputs and results may be tensors, numbers, "
        "strings, None, lists, tuples, named tuples, dicts and ModelOutputs of these; wrap the "
        "model in a module that takes and returns those."
    )


def unflatten(structure: Structure, leaves: list[Any] | tuple[Any, ...]) -> Any:
    """Rebuild nested data; the inverse of `flatten`."""
    kind = structure["kind"]
    if kind == "tensor":
        return leaves[structure["index"]]
    if kind == "constant":
        return structure["value"]
    if kind == "dict":
        return {key: unflatten(item, leaves) for key, item in structure["items"]}
    if kind in ("model_output", "named_tuple"):
        fields = {key: unflatten(item, leaves) for key, item in structure["fields"].items()}
        made = _class_of(kind, structure["class"], tuple(fields))
        if made.__module__ == "torch.return_types":
            return made(tuple(fields.values()))
        return made(**fields)
    if kind in ("list", "tuple"):
        items = [unflatten(item, leaves) for item in structure["items"]]
        return items if kind == "list" else tuple(items)
    raise LoadError(f"unknown container {kind!r} in a stored signature; the folder is damaged.")


def in_order(value: Any, structure: Structure) -> Any:
    """Nested data with the entries of its dicts in a structure's order, where they are the same."""
    kind = structure["kind"]
    if kind == "dict" and type(value) is dict:
        items = dict(structure["items"])
        if items.keys() != value.keys():
            return value
        return {key: in_order(value[key], item) for key, item in items.items()}
    if kind in ("list", "tuple") and type(value) in (list, tuple):
        items = structure["items"]
        if len(items) != len(value):
            return value
        return type(value)(in_order(v, item) for v, item in zip(value, items, strict=True))
    return value


def _named_items(value: Any) -> dict[str, Any] | None:
    """The fields of a named tuple or of what torch.max and its like return; None for the rest."""
    if not isinstance(value, tuple):
        return None
    if type(value).__module__ == "torch.return_types":
        members = vars(type(value)).items()
        names = [name for name, member in members if isinstance(member, MemberDescriptorType)]
    else:
        names = getattr(type(value), "_fields", ())
    return dict(zip(names, value, strict=True)) if names else None


def _class_of(kind: str, name: str, fields: tuple[str, ...]) -> type[Any]:
    """The class of that name: the captured model's own, a public one, or a new one."""
    if isinstance(name, _ClassName):
        return name.known
    public = getattr(modeling_outputs if kind == "model_output" else torch.return_types, name, None)
    base = ModelOutput if kind == "model_output" else tuple
    if isinstance(public, type) and issubclass(public, base):
        return public
    return _MADE.setdefault((kind, name, fields), _new_class(kind, name, fields))


def _new_class(kind: str, name: str, fields: tuple[str, ...]) -> type[Any]:
    if kind == "named_tuple":
        make: Any = collections.namedtuple  # noqa: PYI024 - the fields are known only now
        return make(name, fields)
    typed = [(field, Any, dataclasses.field(default=None)) for field in fields]
    return dataclasses.make_dataclass(name, typed, bases=(ModelOutput,))


def leaf_names(structure: Structure, prefix: str = "") -> list[str]:
    """A readable name for each tensor, in leaf order: `logits`, `hidden_states.0`."""
    kind = structure["kind"]
    if kind == "tensor":
        return [prefix or "output"]
    if kind == "constant":
        return []
    if kind in ("model_output", "named_tuple"):
        pairs = list(structure["fields"].items())
    elif kind == "dict":
        pairs = structure["items"]
    else:
        pairs = list(enumerate(structure["items"]))
    return [
        name
        for key, item in pairs
        for name in leaf_names(item, f"{prefix}.{key}" if prefix else str(key))
    ]
