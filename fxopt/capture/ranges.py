"""Between which sizes a captured graph is the model: what torch.export found out on its way.

Wherever the model's Python code asks for a size (`if x.shape[1] > 64`, a loop over chunks), the
graph follows the branch that the example took. torch.export records the question, from which
follows how far the graph may be believed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph

from fxopt.ir.signature import Signature, SizeRange

# Sizes beyond it are not told apart; no tensor is that long.
_HIGHEST = 1 << 24
# torch.export takes every size that varies to be at least two; what it says below is about itself.
_SPECIALIZED = 2


@dataclass(frozen=True)
class SizeFacts:
    """What holds for the sizes of a graph, by their symbols.

    Attributes:
        intervals: lowest and highest size of each symbol; None where there is no highest.
        conditions: sympy relations, all of which hold.
    """

    intervals: Mapping[str, tuple[int, int | None]]
    conditions: tuple[Any, ...]


def size_facts(exported: ExportedProgram) -> SizeFacts:
    """Collect them, before assertions are taken out of the graph."""
    intervals: dict[str, tuple[int, int | None]] = {}
    for symbol, interval in exported.range_constraints.items():
        high: Any = interval.upper
        intervals[str(symbol)] = (
            int(interval.lower) if _is_finite(interval.lower) else 0,
            int(high) if _is_finite(high) else None,
        )
    nodes = list(exported.graph.nodes)
    asserted = [n.args[0].meta.get("val") for n in nodes if "_assert_scalar" in str(n.target)]
    conditions = [value.node.expr for value in asserted if hasattr(value, "node")]
    values = [n.meta.get("val") for n in nodes if n.op == "placeholder"]
    environments = {
        id(env): env
        for value in values
        if (env := getattr(getattr(value, "fake_mode", None), "shape_env", None)) is not None
    }
    conditions += [guard.expr for env in environments.values() for guard in env.guards]
    return SizeFacts(intervals, tuple(dict.fromkeys(conditions)))


def size_ranges(facts: SizeFacts, graph: Graph, names: Mapping[str, str]) -> dict[str, SizeRange]:
    """Lowest and highest size of each named dimension, and of sums of them ("past + sequence").

    `names` are those of the symbols, as `readable_dimensions` gives them.
    """
    lows: dict[str, int] = {}
    highs: dict[str, int] = {}
    for symbol, size in _example_sizes(graph).items():
        name = names.get(str(symbol))
        if name is None:
            continue
        low, high = facts.intervals.get(str(symbol), (0, None))
        bounds = [(low, high)]
        bounds += [
            _bounds(condition, symbol, size)
            for condition in facts.conditions
            if condition.free_symbols == {symbol} and getattr(condition, "rel_op", "") != "!="
        ]
        lows[name] = max(lows.get(name, 0), *(low for low, _ in bounds))
        for _, high in bounds:
            if high is not None:
                highs[name] = min(highs.get(name, high), high)
    sums = _sums(facts.conditions, names)
    for terms, high in sums.items():
        for name in terms:
            # Where the sum is limited, the tracer limits each term, the others being at least 2.
            rest = sum(lows.get(other, 0) for other in terms if other != name)
            if highs.get(name) == high - rest:
                del highs[name]
    ranges = {name: SizeRange(low, highs.get(name)) for name, low in lows.items()}
    ranges.update({" + ".join(terms): SizeRange(0, high) for terms, high in sums.items()})
    return {
        name: SizeRange(0 if r.low <= _SPECIALIZED else r.low, r.high)
        for name, r in ranges.items()
        if r.low > _SPECIALIZED or r.high is not None
    }


def without_disproved(
    signature: Signature, checked: Iterable[list[Tensor]]
) -> dict[str, SizeRange]:
    """The ranges, less every limit beyond which a graph was seen to be the model.

    The tracer asks about sizes for reasons of its own as well; those limits are none.
    """
    sizes = [signature.sizes(tensors) for tensors in checked]
    kept: dict[str, SizeRange] = {}
    for name, limit in signature.ranges.items():
        seen = [size for known in sizes if (size := limit.size(name, known)) is not None]
        low = 0 if any(size < limit.low for size in seen) else limit.low
        past_high = limit.high is not None and any(size > limit.high for size in seen)
        high = None if past_high else limit.high
        if low or high is not None:
            kept[name] = SizeRange(low, high)
    return kept


def _is_finite(bound: Any) -> bool:
    return bool(getattr(bound, "is_finite", False)) and bool(getattr(bound, "is_Integer", False))


def _example_sizes(graph: Graph) -> dict[Any, int]:
    """The size at which the graph was captured, by the symbol that stands for it."""
    return {
        size.node.expr: int(size.node.hint)
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape
        if not isinstance(size, int) and size.node.expr.is_Symbol
    }


def _bounds(condition: Any, symbol: Any, example: int) -> tuple[int, int | None]:
    """Up and down to where a condition on one size holds, which it does at the example's."""

    def holds(size: int) -> bool:
        return bool(condition.subs(symbol, size))

    def edge(beyond: list[int]) -> int | None:
        """The last size at which it holds; None if it holds everywhere, or here and there."""
        truths = [holds(size) for size in beyond]
        if all(truths) or truths != sorted(truths, reverse=True):
            return None
        first = truths.index(False)
        inside, outside = [example, *beyond][first], beyond[first]
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if holds(middle) else (inside, middle)
        return inside

    up = [example << k for k in range(1, 25) if example << k <= _HIGHEST]
    down = [example >> k for k in range(1, 25) if example >> k >= _SPECIALIZED]
    low, high = edge(down), edge(up)
    return (0 if low is None else low), high


def _sums(conditions: Iterable[Any], names: Mapping[str, str]) -> dict[tuple[str, ...], int]:
    """The highest value of every sum of named sizes that a condition limits."""
    found: dict[tuple[str, ...], int] = {}
    for condition in conditions:
        sign = {"<=": 1, "<": 1, ">=": -1, ">": -1}.get(getattr(condition, "rel_op", ""))
        if sign is None:
            continue
        strict = condition.rel_op in ("<", ">")
        terms = dict((sign * (condition.lhs - condition.rhs)).expand().as_coefficients_dict())
        high = -int(sum(int(v) for k, v in terms.items() if k.is_number)) - strict
        terms = {k: v for k, v in terms.items() if not k.is_number}
        if len(terms) < 2 or any(v != 1 or str(k) not in names for k, v in terms.items()):
            continue
        key = tuple(sorted({names[str(k)] for k in terms}))
        if len(key) == len(terms):
            found[key] = min(found.get(key, high), high)
    return found
