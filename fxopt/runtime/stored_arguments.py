"""Arguments of graph nodes as JSON: what JSON has stands for itself, all else carries a tag."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from fxopt.errors import LoadError, SaveError

_LARGEST = 2**64
_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _torch_constants(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(torch).items() if isinstance(value, kind)}


DTYPES: dict[str, torch.dtype] = _torch_constants(torch.dtype)
LAYOUTS: dict[str, torch.layout] = _torch_constants(torch.layout)
MEMORY_FORMATS: dict[str, torch.memory_format] = _torch_constants(torch.memory_format)


def encode(value: Any, where: str) -> Any:
    """One argument as JSON.

    Raises:
        SaveError: the argument is of a kind that no stored graph can hold.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | complex):
        return _encode_number(value)
    if isinstance(value, list):
        return [encode(item, where) for item in value]
    if isinstance(value, dict):
        return {"dict": [[str(key), encode(item, where)] for key, item in value.items()]}
    for kind, tag, content in _TAGS:
        if isinstance(value, kind):
            return {tag: encode(content(value), where)}
    raise SaveError(
        f"{where} has an argument of type {type(value).__name__}, which a stored graph cannot "
        "hold. Use numbers, strings, lists and values of the graph."
    )


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


_TAGS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (Node, "node", lambda node: node.name),
    (tuple, "tuple", list),
    (slice, "slice", lambda part: [part.start, part.stop, part.step]),
    (torch.device, "device", str),
    (torch.dtype, "dtype", _torch_name),
    (torch.layout, "layout", _torch_name),
    (torch.memory_format, "memory_format", _torch_name),
    (type(...), "ellipsis", lambda _: True),
)


def _encode_number(value: complex) -> Any:
    if isinstance(value, complex):
        return {"complex": [_encode_number(value.real), _encode_number(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decode(data: Any, nodes: Mapping[str, Node], where: str) -> Any:
    """The inverse of `encode`; `nodes` holds the nodes that stand earlier in the graph.

    Raises:
        LoadError: the data is not what `encode` writes.
    """
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, int | float):
        return _number(data, where)
    if isinstance(data, list):
        return [decode(item, nodes, where) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((tag, content),) = data.items()
        if tag in _TABLES:
            return _look_up(tag, content, where)
        decoder = _DECODERS.get(tag)
        if decoder is not None:
            return decoder(content, nodes, where)
    raise _damaged(where, data)


def _damaged(where: str, data: Any) -> LoadError:
    return LoadError(
        f"{where} holds an argument that fxopt does not write ({str(data)[:60]!r}); the folder is "
        "damaged or was not written by fxopt. Save the model again."
    )


def _number(data: float, where: str) -> float:
    if not (isinstance(data, float) and math.isfinite(data)) and not abs(data) <= _LARGEST:
        raise _damaged(where, data)
    return data


def _node(content: Any, nodes: Mapping[str, Node], where: str) -> Node:
    if not isinstance(content, str):
        raise _damaged(where, content)
    if content not in nodes:
        raise LoadError(
            f"{where} reads {content!r}, which does not stand before it in the graph; the folder "
            "is damaged or was not written by fxopt. Save the model again."
        )
    return nodes[content]


def _items(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise _damaged(where, content)
    return content


def _tuple(content: Any, nodes: Mapping[str, Node], where: str) -> tuple[Any, ...]:
    return tuple(decode(item, nodes, where) for item in _items(content, where))


def _dict(content: Any, nodes: Mapping[str, Node], where: str) -> dict[str, Any]:
    pairs = [_items(item, where) for item in _items(content, where)]
    if any(len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs):
        raise _damaged(where, content)
    return {key: decode(item, nodes, where) for key, item in pairs}


def _slice(content: Any, nodes: Mapping[str, Node], where: str) -> slice:
    parts = _tuple(content, nodes, where)
    if len(parts) != 3 or not all(part is None or isinstance(part, int | Node) for part in parts):
        raise _damaged(where, content)
    return slice(*parts)


def _complex(content: Any, nodes: Mapping[str, Node], where: str) -> complex:
    parts = _tuple(content, nodes, where)
    if len(parts) != 2 or not all(type(part) in (int, float) for part in parts):
        raise _damaged(where, content)
    return complex(*parts)


def _device(content: Any, _: Mapping[str, Node], where: str) -> torch.device:
    if not isinstance(content, str) or not _DEVICE.fullmatch(content):
        raise _damaged(where, content)
    try:
        return torch.device(content)
    except RuntimeError:
        raise _damaged(where, content) from None


def _ellipsis(content: Any, _: Mapping[str, Node], where: str) -> Any:
    if content is not True:
        raise _damaged(where, content)
    return ...


def _look_up(tag: str, content: Any, where: str) -> Any:
    if not isinstance(content, str) or content not in _TABLES[tag]:
        raise _damaged(where, content)
    return _TABLES[tag][content]


_TABLES: dict[str, dict[str, Any]] = {
    "float": _FLOATS,
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "memory_format": MEMORY_FORMATS,
}
_DECODERS: dict[str, Callable[[Any, Mapping[str, Node], str], Any]] = {
    "node": _node,
    "tuple": _tuple,
    "dict": _dict,
    "slice": _slice,
    "complex": _complex,
    "device": _device,
    "ellipsis": _ellipsis,
}
