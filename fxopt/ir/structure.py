"""Nested inputs and outputs as plain data plus a flat list of tensors.

A structure is JSON: it can be stored beside the weights and rebuilt without importing the
model's code. HF `ModelOutput` classes are kept by name; after loading, those that
`transformers.modeling_outputs` does not hold come back as a ModelOutput of the same name and
fields.
"""

import dataclasses
from typing import Any

import torch
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from fxopt.errors import CaptureError, LoadError

Structure = dict[str, Any]
_CLASSES: dict[tuple[str, tuple[str, ...]], type[ModelOutput]] = {}


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
    if isinstance(value, ModelOutput):
        fields = {key: flatten(item, leaves, f"{where}.{key}") for key, item in value.items()}
        _CLASSES[type(value).__name__, tuple(fields)] = type(value)
        return {"kind": "model_output", "class": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        items = [[k, flatten(item, leaves, f"{where}[{k!r}]")] for k, item in value.items()]
        return {"kind": "dict", "items": items}
    if type(value) in (list, tuple):
        items = [flatten(item, leaves, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"kind": type(value).__name__, "items": items}
    raise CaptureError(
        f"{where} is a {type(value).__name__}. Inputs and results may be tensors, numbers, "
        "strings, None, lists, tuples, dicts and ModelOutputs of these; wrap the model in a "
        "module that takes and returns those."
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
    if kind == "model_output":
        fields = {key: unflatten(item, leaves) for key, item in structure["fields"].items()}
        return output_class(structure["class"], tuple(fields))(**fields)
    if kind in ("list", "tuple"):
        items = [unflatten(item, leaves) for item in structure["items"]]
        return items if kind == "list" else tuple(items)
    raise LoadError(f"unknown container {kind!r} in a stored signature; the folder is damaged.")


def output_class(name: str, fields: tuple[str, ...]) -> type[ModelOutput]:
    """The ModelOutput class of that name, or a new one with these fields."""
    known = _CLASSES.get((name, fields))
    if known is not None:
        return known
    public = getattr(modeling_outputs, name, None)
    if isinstance(public, type) and issubclass(public, ModelOutput):
        return public
    made = dataclasses.make_dataclass(
        name,
        [(field, Any, dataclasses.field(default=None)) for field in fields],
        bases=(ModelOutput,),
    )
    _CLASSES[name, fields] = made
    return made


def leaf_names(structure: Structure, prefix: str = "") -> list[str]:
    """A readable name for each tensor, in leaf order: `logits`, `hidden_states.0`."""
    kind = structure["kind"]
    if kind == "tensor":
        return [prefix or "output"]
    if kind == "constant":
        return []
    if kind == "model_output":
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
