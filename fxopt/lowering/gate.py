"""The speed gate: a kernel is used where it is measured to be faster than what it replaces."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Program, module_path
from fxopt.ir.runner import Runner
from fxopt.ir.stored_codes import is_stored_weight, stored_values, stored_weights
from fxopt.ir.timing import time_by_turns
from fxopt.lowering.rule import LoweringRule
from fxopt.rewrite.driver import apply_rules, erase_dead
from fxopt.rewrite.pattern import Match
from fxopt.rewrite.rule import Rule
from fxopt.rewrite.sizes import fixed

ops = torch.ops.fxopt

_FEWEST_CALLS = 4
_ENOUGH_SECONDS = 0.02
# On a busy machine any single measurement can be spoilt: a kernel is turned down only when it
# loses this many times in a row.
_TRIALS = 3
_UNDECIDED = "nothing was decided on it when the model was saved"


@dataclass(frozen=True)
class Timing:
    """How long what came in and its kernel take, in microseconds, at each shape."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Geometric mean of after / before over the shapes."""
        logs = [math.log(b / a) for a, b in zip(self.before, self.after, strict=True) if a > 0]
        # Nothing could be timed: no reason to believe that the kernel is faster.
        return math.exp(sum(logs) / len(logs)) if logs else math.inf


@dataclass
class SpeedGate:
    """Times each distinct site once; remembers what it decided.

    Attributes:
        shapes: (batch, length) pairs at which sites are timed.
        decisions: what was decided, by site; given ones are obeyed and nothing is timed, so that
            a saved model runs the same kernels wherever it is loaded.
        enabled: False takes every kernel untimed.
    """

    shapes: Sequence[tuple[int, int]]
    decisions: dict[str, bool] = field(default_factory=dict[str, bool])
    enabled: bool = True
    frozen: bool = False
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])
    sites: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])

    def refuse(self, program: Program, rule: LoweringRule, match: Match) -> str | None:
        """Why the kernel is not used at this site, or None."""
        if not self.enabled or rule.patience == math.inf:
            return None
        mini, leaves = extract(program, match, rule.kept(match))
        key = _key(mini, rule)
        if key not in self.decisions:
            if self.frozen:
                return _UNDECIDED if rule.joins and self.decisions else None
            example = partial(example_value, program=program, routings=rule.routings(match))
            self.decisions[key] = self._time(mini, leaves, rule, key, example)
        if self.decisions[key]:
            self.sites.append((module_path(match.root), rule.name, key))
            return None
        timing = self.timings.get(key)
        detail = ""
        if timing is not None:
            pairs = zip(timing.before, timing.after, strict=True)
            detail = ": " + ", ".join(
                f"{after:.0f} us against {before:.0f} us" for before, after in pairs
            )
        return f"slower than what it replaces{detail}"

    def _time(
        self,
        mini: Program,
        leaves: list[Node],
        rule: LoweringRule,
        key: str,
        example: Callable[..., Tensor],
    ) -> bool:
        after = mini.clone()
        sites, _ = apply_rules(after, [rule], "gate")
        if not sites:
            return False
        plain = as_it_came(mini)
        before, kernel = Runner(plain.graph_module), Runner(after.graph_module)
        inputs = [[example(leaf, shape=shape) for leaf in leaves] for shape in self.shapes]
        faster = self._faster(inputs, before, kernel, key, rule.patience)
        for part in (plain, after):
            part.release()
        release_freed_memory(mini.byte_count())  # the next site may be another weight's
        return faster

    def _faster(
        self,
        examples: Sequence[list[Tensor]],
        before: Runner,
        kernel: Runner,
        key: str,
        patience: float,
    ) -> bool:
        for _ in range(_TRIALS):
            timing = self._measure(examples, before, kernel)
            known = self.timings.get(key)
            if known is None or timing.ratio < known.ratio:
                self.timings[key] = timing
            if timing.ratio <= patience:
                return True
        return False

    def _measure(self, examples: Sequence[list[Tensor]], before: Runner, kernel: Runner) -> Timing:
        old: list[float] = []
        new: list[float] = []
        for inputs in examples:
            try:
                a, b = alternate(
                    lambda i=inputs: before.forward(*i), lambda i=inputs: kernel.forward(*i)
                )
            except RuntimeError:
                continue  # this shape does not fit the model (a position table is shorter, say)
            old.append(a)
            new.append(b)
        return Timing(tuple(old), tuple(new))


def extract(
    program: Program, match: Match, kept: Sequence[Node] = ()
) -> tuple[Program, list[Node]]:
    """The matched part as a program of its own, and the nodes that feed it.

    It returns the match's root, and `kept`, which a kernel has to return as well.
    """
    leaves: list[Node] = []
    order: list[Node] = []

    def visit(node: Node) -> None:
        if node in order or node in leaves:
            return
        if not (node.op == "get_attr" or node in match.interior or is_stored_weight(node)):
            leaves.append(node)
            return
        for source in node.all_input_nodes:
            visit(source)
        order.append(node)

    visit(match.root)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for leaf in leaves:
        copies[leaf] = graph.placeholder(leaf.name)
        copies[leaf].meta = dict(leaf.meta)
    for node in order:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
    for node in order:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output((copies[match.root], *(copies[node] for node in kept)))
    mini = Program(GraphModule(program.graph_module, graph), program.signature, program.level)
    return mini, leaves


def as_it_came(mini: Program) -> Program:
    """The part before quantization: floating weights, activations not rounded."""
    plain = mini.clone()
    for node in list(stored_weights(plain)):
        name = f"{node.name}_float"
        plain.set_weight(name, stored_values(plain, node))
        with plain.graph.inserting_before(node):
            read = plain.graph.get_attr(name)
        node.replace_all_uses_with(read)
        erase_dead([node])
    for node in list(plain.nodes(ops.dequantize.default)):
        quantized = node.args[0]
        if isinstance(quantized, Node) and quantized.target is ops.quantize.default:
            node.replace_all_uses_with(quantized.args[0])  # type: ignore[arg-type]
            erase_dead([node])
    return plain


def example_value(
    node: Node,
    program: Program,
    shape: tuple[int, int],
    routings: Mapping[Node, int] | None = None,
) -> Tensor:
    """Random values of a node's shape at a given batch size and length."""
    value = node.meta["val"]
    sizes = [size_at(size, program, shape) for size in value.shape]
    if value.dtype.is_floating_point:
        # A generator of its own: optimizing must not move the user's random numbers.
        noise = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return noise.to(device=value.device, dtype=value.dtype)
    if routings is not None and node in routings:
        places = torch.arange(math.prod(sizes), device=value.device) % routings[node]
        return places.reshape(sizes).to(value.dtype)
    # Masks keep everything; indices point at the first row.
    fill = torch.ones if value.dtype == torch.bool else torch.zeros
    return fill(sizes, dtype=value.dtype, device=value.device)


def size_at(size: Any, program: Program, shape: tuple[int, int]) -> int:
    """A dimension at a given batch size and length; an empty cache.

    A dimension that depends on a tensor's values is taken to be as long as the sequence.
    """
    if type(size) is int:
        return size
    expression = size.node.expr
    named = {"batch": shape[0], "sequence": shape[1], "source": shape[1], "past": 0}
    known: dict[Any, int] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.signature.inputs, strict=False):
        for dimension, name in zip(node.meta["val"].shape, spec.shape, strict=False):
            if type(dimension) is not int and dimension.node.expr.is_Symbol:
                default = shape[1] if str(name).startswith("past_") else int(dimension.node.hint)
                known[dimension.node.expr] = named.get(str(name), default)
    result = expression.subs(known)
    if result.is_number:
        return int(result)
    return shape[1] if size.node.hint is None else int(size.node.hint)


def alternate(before: Callable[[], Any], after: Callable[[], Any]) -> tuple[float, float]:
    """The fastest single call of each among many alternated ones, in microseconds.

    The fastest call is the one that other work on the machine disturbed least.
    """
    old, new = time_by_turns((before, after), _FEWEST_CALLS, _ENOUGH_SECONDS)
    return min(old) * 1e6, min(new) * 1e6


def _key(mini: Program, rule: Rule) -> str:
    """Sites with the same operators, shapes and constants share one decision."""
    number = {node: f"%{i}" for i, node in enumerate(mini.graph.nodes)}
    lines = [rule.name]
    for node in mini.graph.nodes:
        value = node.meta.get("val")
        # A size that capture knows under a symbol is a plain number once it was stored.
        sizes = [fixed(size) for size in getattr(value, "shape", ())]
        shape = ["*" if size is None else size for size in sizes]
        operands = map_arg((node.args, node.kwargs), lambda n: number[n])
        target = node.target if node.op == "call_function" else ""
        lines.append(f"{node.op} {target} {operands} {shape} {getattr(value, 'dtype', '')}")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return f"{rule.name}:{digest}"
