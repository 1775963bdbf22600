"""What calibration data did not show of the activations that were observed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import module_path

aten = torch.ops.aten
_NAMED = 4


def gaps(nodes: Iterable[Node], statistics: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What the report says of activations that had too few tokens, or nothing but zeros.

    Fewer tokens than channels leave directions of the input unseen.
    """
    tokens, low, high = (statistics[kind] for kind in ("tokens", "minimum", "maximum"))
    short: dict[str, tuple[int, int]] = {}
    zero: list[str] = []
    for node in nodes:
        if node.name not in tokens:
            continue  # never computed: the pass that needs it says so
        count, channels = int(tokens[node.name]), len(low[node.name])
        if count < channels:
            short[_reader(node)] = (count, channels)
        if not bool(low[node.name].any() | high[node.name].any()):
            zero.append(_reader(node))
    notes: list[str] = []
    if short:
        count, channels = max(short.values(), key=lambda pair: pair[1] / pair[0])
        worst = [name for name, pair in short.items() if pair == (count, channels)]
        notes.append(
            f"fewer real tokens than channels at {len(short)} inputs: {count:,} for {channels:,} "
            f"at {_some(worst)}; what other text holds cannot be told from so few"
        )
    if zero:
        notes.append(f"calibration data gave nothing but zeros to {_some(zero)}")
    return tuple(notes)


def _reader(node: Node) -> str:
    """The module path of what reads an activation, or where it is made."""
    readers = [user for user in node.users if user.target is aten.linear.default]
    return module_path((readers or [node])[0]) or node.name


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
