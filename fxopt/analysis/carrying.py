"""Carry statistics of activations over a rewrite, where it changed them channel by channel.

    x' = x / s         min x' = min x / s,  mean|x'| = mean|x| / s,  rows x' = rows x / s
    x' = x[pi]         each statistic [channels] in the order pi
    x' = round(x)      as if x were not rounded

Shapes: x [..., channels], s and pi [channels]. Of all channels together (the range of a batch, a
    histogram) only what leaves each value where it is leaves what was known.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import Program, shape_of

aten = torch.ops.aten
# Of all channels together, so that a factor for each channel cannot be carried over.
_OF_ALL_CHANNELS = ("batches", "histogram")

Statistics = dict[str, dict[str, Any]]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChannelChange:
    """How an activation follows from one that is known.

    Attributes:
        source: the name of the node it was, or that it is computed from.
        change: old values [..., channels] to new ones, linear and channel by channel; None where
            it is not so.
        keeps_values: whether channels only change places.
    """

    source: str
    change: Change | None
    keeps_values: bool = False

    def then(self, later: "ChannelChange") -> "ChannelChange":
        """This change and one after it."""
        first, second = self.change, later.change
        if first is None or second is None:
            return ChannelChange(self.source, None)
        both = self.keeps_values and later.keeps_values
        return ChannelChange(self.source, lambda x: second(first(x)), both)


@dataclass
class Known:
    """Statistics of activations, and of which nodes they are.

    Attributes:
        statistics: by kind ("minimum", ...) and name of the node.
        covered: by kind, the nodes of which it is known, or known that no token reached them.
        rows: about how many rows there are of each.
    """

    statistics: Statistics = field(default_factory=dict[str, dict[str, Any]])
    covered: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    rows: int = 0

    def carried(self, changes: Mapping[str, ChannelChange]) -> "Known":
        """What is known of activations, of which some have changed or are new."""
        result = self.restricted(
            self.covered, {n for names in self.covered.values() for n in names} - set(changes)
        )
        for name, step in changes.items():
            for kind, names in self.covered.items():
                whole = kind not in _OF_ALL_CHANNELS or step.keeps_values
                if step.change is None or step.source not in names or not whole:
                    continue
                result.covered[kind].add(name)
                if step.source in self.statistics[kind]:
                    result.statistics[kind][name] = self._changed(kind, step.source, step.change)
        return result

    def _changed(self, kind: str, source: str, change: Change) -> Any:
        value = self.statistics[kind][source]
        if kind in ("tokens", *_OF_ALL_CHANNELS):
            return value
        if kind in ("minimum", "maximum"):
            # A factor of -1 makes the one the other.
            ends = [change(self.statistics[end][source]) for end in ("minimum", "maximum")]
            return torch.minimum(*ends) if kind == "minimum" else torch.maximum(*ends)
        moved = change(value)
        return moved.abs() if kind == "mean_abs" else moved

    def restricted(self, kinds: Iterable[str], names: set[str]) -> "Known":
        """Some kinds of statistics of some nodes."""
        kept = [kind for kind in self.covered if kind in kinds]
        statistics = {
            kind: {name: value for name, value in self.statistics[kind].items() if name in names}
            for kind in kept
        }
        return Known(statistics, {kind: self.covered[kind] & names for kind in kept}, self.rows)

    def all_names(self) -> set[str]:
        """The nodes of which everything that is held here is known."""
        return set.intersection(*self.covered.values()) if self.covered else set()


def derivations(
    program: Program, nodes: Iterable[Node], known: set[str]
) -> dict[str, ChannelChange]:
    """Those of `nodes` that the graph computes channel by channel from known ones, and how."""
    found: dict[str, ChannelChange] = {}
    for node in nodes:
        steps: list[ChannelChange] = []
        source: Any = node
        while source.name not in known:
            step = _step(program, source)
            if step is None:
                break
            source = step[0]
            steps.insert(0, ChannelChange(source.name, step[1], step[2]))
        if steps and source.name in known:
            whole = steps[0]
            for step in steps[1:]:
                whole = whole.then(step)
            found[node.name] = whole
    return found


def _step(program: Program, node: Node) -> tuple[Node, Change, bool] | None:
    """What a node does to each channel of the activation it reads, if that is all it does."""
    args: Any = node.args
    if node.target is torch.ops.fxopt.dequantize.default:
        codes = args[0]
        rounds = isinstance(codes, Node) and codes.target is torch.ops.fxopt.quantize.default
        return (codes.args[0], lambda x: x, True) if rounds else None  # type: ignore[return-value]
    if node.target is aten.mul.Tensor and (factor := _held(program, args[1])) is not None:
        rank = len(shape_of(node))
        plain = factor.numel() == 1 or list(factor.shape) == [shape_of(node)[-1]]
        return (args[0], lambda x: x * factor.to(x.dtype), False) if plain and rank else None
    if node.target is aten.index_select.default and args[1] in (-1, len(shape_of(node)) - 1):
        order = _held(program, args[2])
        if order is not None and torch.equal(order.sort().values, torch.arange(len(order))):
            return args[0], lambda x: x[..., order], True
    return None


def _held(program: Program, value: Any) -> Tensor | None:
    stored = isinstance(value, Node) and value.op == "get_attr"
    return program.weight(str(value.target)) if stored else None
