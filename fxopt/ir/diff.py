"""What differs between two programs, in the words of the model: modules, operators, weights."""

import html
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import Program, module_path
from fxopt.ir.text import format_program, format_type, operator_name

WHOLE_MODEL = "(model)"


@dataclass(frozen=True)
class ModuleDiff:
    """Operators of one module that only one of the programs has, with counts.

    `changed` counts calls that are in both programs with other arguments.
    """

    removed: dict[str, int] = field(default_factory=dict[str, int])
    added: dict[str, int] = field(default_factory=dict[str, int])
    changed: dict[str, int] = field(default_factory=dict[str, int])

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed)


@dataclass(frozen=True)
class WeightDiff:
    """A weight that changed: its dtype and shape in each program, None where it is missing."""

    before: str | None
    after: str | None
    bytes_before: int
    bytes_after: int
    largest_change: float | None = None  # over the values, where dtype and shape are the same

    def __str__(self) -> str:
        if self.before is None:
            return f"new {self.after}, {self.bytes_after:,} bytes"
        if self.after is None:
            return f"removed ({self.before}, {self.bytes_before:,} bytes)"
        if self.before == self.after:
            return f"{self.before}, values changed by at most {self.largest_change:.3g}"
        return f"{self.before} -> {self.after}, {self.bytes_before:,} -> {self.bytes_after:,} bytes"


@dataclass(frozen=True)
class Diff:
    """What differs between two programs; false when nothing does."""

    interface: tuple[str, ...]
    modules: dict[str, ModuleDiff]
    weights: dict[str, WeightDiff]
    bytes_before: int
    bytes_after: int

    def __bool__(self) -> bool:
        return bool(self.interface or self.modules or self.weights)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines = list(self.interface)
        for path, module in self.modules.items():
            lines.append(path)
            lines += [f"  - {_times(name, n)}" for name, n in module.removed.items()]
            lines += [f"  + {_times(name, n)}" for name, n in module.added.items()]
            lines += [f"  ~ {_times(name, n)}" for name, n in module.changed.items()]
        if self.weights:
            lines.append("weights")
            lines += [f"  {name}: {weight}" for name, weight in self.weights.items()]
        lines.append(self.byte_line())
        return "\n".join(lines)

    def byte_line(self) -> str:
        """The bytes of all weights, before and after."""
        ratio = f" ({self.bytes_after / self.bytes_before:.3f}x)" if self.bytes_before else ""
        return f"{self.bytes_before:,} -> {self.bytes_after:,} bytes{ratio}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "interface": list(self.interface),
            "modules": {path: vars(module) for path, module in self.modules.items()},
            "weights": {name: vars(weight) for name, weight in self.weights.items()},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_html(self) -> str:
        """A fragment of HTML: one table of operators, one of weights."""
        parts = [f"<p>{html.escape(line)}</p>" for line in self.interface]
        operators = [
            [path, _listed(module.removed), _listed(module.added), _listed(module.changed)]
            for path, module in self.modules.items()
        ]
        weights = [
            [name, w.before or "", w.after or "", f"{w.bytes_before:,}", f"{w.bytes_after:,}"]
            for name, w in self.weights.items()
        ]
        if operators:
            parts.append(_table(["module", "removed", "added", "changed"], operators))
        if weights:
            parts.append(_table(["weight", "before", "after", "bytes", "bytes after"], weights))
        parts.append(f"<p>{html.escape(self.byte_line() if self else 'no difference')}</p>")
        return f'<section class="fxopt-diff">{"".join(parts)}</section>'


def diff(a: Program, b: Program) -> Diff:
    """Compare two programs; node names and recorded shapes do not matter."""
    interface = tuple(_interface(a, b))
    modules = _modules(a, b)
    weights = _weights(a, b)
    if not interface and not modules and not weights and _text(a) != _text(b):
        # Every call has a twin in the same module, but they are wired or ordered otherwise.
        interface = ("the same operators are connected or ordered differently",)
    return Diff(interface, modules, weights, a.byte_count(), b.byte_count())


def _text(program: Program) -> str:
    return format_program(program, types=False)


def _interface(a: Program, b: Program) -> list[str]:
    lines: list[str] = []
    if a.level != b.level:
        lines.append(f"level {a.level.name} -> {b.level.name}")
    for side in ("inputs", "outputs"):
        old = {spec.name: spec for spec in getattr(a.signature, side)}
        new = {spec.name: spec for spec in getattr(b.signature, side)}
        for name in [*old, *(name for name in new if name not in old)]:
            before, after = (
                format_type(specs[name].dtype, specs[name].shape) if name in specs else "nothing"
                for specs in (old, new)
            )
            if before != after:
                lines.append(f"{side[:-1]} {name}: {before} -> {after}")
    return lines


# --- operators ------------------------------------------------------------------------------


def _modules(a: Program, b: Program) -> dict[str, ModuleDiff]:
    old, new = _calls(a), _calls(b)
    found: dict[str, ModuleDiff] = {}
    for path in [*old, *(path for path in new if path not in old)]:
        module = _compare_calls(old.get(path, Counter()), new.get(path, Counter()))
        if module:
            found[path] = module
    return found


def _calls(program: Program) -> dict[str, Counter[tuple[str, str]]]:
    """Per module: how often each operator is called with which arguments."""
    calls: dict[str, Counter[tuple[str, str]]] = {}
    for node in program.nodes():
        arguments = repr([_describe(v) for v in node.args]) + repr(
            {name: _describe(v) for name, v in node.kwargs.items()}
        )
        path = module_path(node) or WHOLE_MODEL
        calls.setdefault(path, Counter())[operator_name(node.target), arguments] += 1
    return calls


def _describe(value: Any) -> Any:
    if isinstance(value, Node):
        if value.op in ("placeholder", "get_attr"):
            return (str(value.target),)
        return "%"  # a call whose operand is new only follows what is reported there
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    return repr(value)


def _compare_calls(old: Counter[tuple[str, str]], new: Counter[tuple[str, str]]) -> ModuleDiff:
    gone, come = _by_operator(old - new), _by_operator(new - old)
    both = {name: min(count, come[name]) for name, count in gone.items() if name in come}
    return ModuleDiff(
        removed={n: c - both.get(n, 0) for n, c in gone.items() if c > both.get(n, 0)},
        added={n: c - both.get(n, 0) for n, c in come.items() if c > both.get(n, 0)},
        changed=both,
    )


def _by_operator(calls: Counter[tuple[str, str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (name, _), count in calls.items():
        counts[name] += count
    return dict(sorted(counts.items()))


# --- weights --------------------------------------------------------------------------------


def _weights(a: Program, b: Program) -> dict[str, WeightDiff]:
    old, new = a.weights(), b.weights()
    found: dict[str, WeightDiff] = {}
    for name in sorted({*old, *new}):
        change = _compare_weights(old.get(name), new.get(name))
        if change is not None:
            found[name] = change
    return found


def _compare_weights(old: Tensor | None, new: Tensor | None) -> WeightDiff | None:
    before = None if old is None else format_type(old.dtype, old.shape)
    after = None if new is None else format_type(new.dtype, new.shape)
    largest = None
    if old is not None and new is not None and before == after:
        if _bit_equal(old, new):
            return None
        difference = (old.double() - new.double()).abs() if not old.is_complex() else old - new
        largest = float(difference.abs().max())
    return WeightDiff(before, after, _bytes(old), _bytes(new), largest)


def _bit_equal(old: Tensor, new: Tensor) -> bool:
    if old is new or old.numel() == 0:
        return True
    if torch.equal(old, new):
        return True
    # NaN is not equal to itself.
    same = (old == new) | ((old != old) & (new != new))
    return bool(same.all())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


# --- text -----------------------------------------------------------------------------------


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name}  x{count}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(_times(name, count) for name, count in counts.items())


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
