"""From a call as the model takes it to the flat tensors a graph takes, and back."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxopt.errors import InputError
from fxopt.ir.cache_names import CACHE_NAMES
from fxopt.ir.signature import Signature, TensorSpec, default_tensor
from fxopt.ir.structure import Structure, flatten, in_order, unflatten

# Flags that HF models take beside tensors. True where the graph can do without being told.
_NEUTRAL = ("return_dict", "use_cache", "cache_position", "logits_to_keep")
_UNAVAILABLE = {
    "output_attentions": "fused attention never forms attention maps",
    "output_hidden_states": "the graph returns what the model returned at capture",
    "labels": "the graph computes no loss",
    "inputs_embeds": "the program was captured on token ids",
}


def bind_structured(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Flat tensors for a plain module, called with the nesting it was captured with.

    Positional arguments may be given by keyword and the other way round.

    Raises:
        InputError: the nesting, or a value that was fixed at capture, differs.
    """
    for attempt in _arrangements(signature, args, kwargs):
        leaves: list[Tensor] = []
        arranged = in_order(attempt, signature.input_structure)
        structure = flatten(arranged, leaves, "the inputs")
        if structure == signature.input_structure:
            return leaves
    raise InputError(
        f"the call does not fit the captured signature. Called with {_outline(args, kwargs)}; "
        f"captured with {_describe(signature.input_structure)}."
    )


def _arrangements(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The call as it came and, where every argument has a name, by position and by keyword."""
    asked = (tuple(args), dict(kwargs))
    names = list(signature.parameters)
    if len(args) > len(names) or not set(kwargs) <= set(names) - set(names[: len(args)]):
        return [asked]
    merged = {**dict(zip(names, args, strict=False)), **kwargs}
    ordered = {name: merged[name] for name in names if name in merged}
    return [asked, (tuple(ordered.values()), {}), ((), ordered)]


def _outline(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [_kind(value) for value in args]
    parts += [f"{name}={_kind(value)}" for name, value in kwargs.items()]
    return f"({', '.join(parts)})"


def _kind(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def _describe(structure: Structure) -> str:
    class Placeholder:
        def __repr__(self) -> str:
            return "tensor"

    leaves = [Placeholder()] * 256
    args, kwargs = unflatten(structure, leaves)
    parts = [repr(value) for value in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})"


def bind_keywords(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name; flags the graph does not need and inputs left out are dropped.

    Raises:
        InputError: an argument is unknown, passed twice, or asks for what the graph does not
            compute.
    """
    if len(args) > len(signature.parameters):
        raise InputError(
            f"{len(args)} positional arguments; the model takes {len(signature.parameters)}."
        )
    positional = dict(zip(signature.parameters, args, strict=False))
    twice = [name for name in positional if name in kwargs]
    if twice:
        raise InputError(f"{twice[0]!r} is passed by position and by keyword; pass it once.")
    named = {**positional, **kwargs}
    bound: dict[str, Any] = {}
    known = [spec.name for spec in signature.inputs]
    for name, value in named.items():
        if value is None or name in _NEUTRAL or name in signature.ignored:
            continue
        if name in _UNAVAILABLE:
            if value is not False:
                raise InputError(f"{name} is not available: {_UNAVAILABLE[name]}.")
        elif name in known or name in (*CACHE_NAMES, "encoder_outputs"):
            bound[name] = value
        elif value is not False:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"unknown input {name!r}; the program takes {', '.join(known[:8])}.{hint} An input "
                "that the model has and the program lacks must be among example_inputs at capture; "
                "flags are those of the config at capture."
            )
    return bound


def fill_defaults(
    signature: Signature, specs: Sequence[TensorSpec], bound: dict[str, Any], past: int
) -> None:
    """Give every omitted optional input the value that leaving it out means, in place.

    Raises:
        InputError: an input without a default is missing.
    """
    convert_integers(specs, bound)
    sizes: dict[str, int] = {"past": past}
    device = None
    for spec in specs:
        value = bound.get(spec.name)
        if isinstance(value, Tensor):
            device = value.device
            for dimension, size in zip(spec.shape, value.shape, strict=False):
                if isinstance(dimension, str) and dimension.isidentifier():
                    sizes.setdefault(dimension, size)
    for spec in specs:
        if spec.name in bound:
            continue
        default = signature.defaults.get(spec.name)
        if default is None or device is None:
            raise InputError(
                f"input {spec.name!r} {list(spec.shape)} {spec.dtype} is missing and has no "
                "default."
            )
        columns = spec.shape[1]
        counted = past + sizes.get("sequence", 0)
        length = sizes.get(columns, counted) if isinstance(columns, str) else columns
        first = past if columns == "sequence" else 0
        batch = _batch(spec, sizes)
        bound[spec.name] = default_tensor(default, batch, length, first, device).to(spec.dtype)


def convert_integers(specs: Sequence[TensorSpec], bound: dict[str, Any]) -> None:
    """Give masks and ids the integer dtype of the program, in place; values stay the same."""
    for spec in specs:
        value = bound.get(spec.name)
        if not isinstance(value, Tensor) or value.dtype == spec.dtype:
            continue
        if not value.is_floating_point() and not spec.dtype.is_floating_point:
            bound[spec.name] = value.to(spec.dtype)


def _batch(spec: TensorSpec, sizes: dict[str, int]) -> int:
    rows = spec.shape[0]
    if isinstance(rows, int):
        return rows
    return sizes.get(rows, sizes.get("batch", 1))
