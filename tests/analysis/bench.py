"""Small graphs around one operator, built node by node with float64 weights of random sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt.ir.inference import fake_mode
from fxopt.ir.program import Program, WeightTree
from fxopt.ir.signature import Signature, TensorSpec
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
fxopt = torch.ops.fxopt


@dataclass(frozen=True)
class Sizes:
    """The sizes of one sample; `width` channels, or `heads` of `dim` (even) in kv groups."""

    batch: int
    length: int
    width: int
    heads: int
    group: int
    dim: int


@dataclass
class Bench:
    """Builds a graph; weights are standard normal, or all positive where an operator needs it."""

    sizes: Sizes
    seed: int
    positive: bool = False
    inputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        graph = torch.fx.Graph()
        self.program = Program(GraphModule(WeightTree(), graph), Signature((), (), {}, {}))
        self.output = graph.output(())
        self.output.meta = {"module_path": "", "from_node": []}
        self.build = Builder(self.program, self.output, "test")

    def numbers(self, *shape: int) -> Tensor:
        value = torch.randn(shape, generator=self.random, dtype=torch.float64)
        return value.abs() + 0.1 if self.positive else value

    def given(self, value: Tensor) -> Node:
        """An input of the graph."""
        mode = fake_mode(self.program)
        first = next(iter(self.program.graph.nodes))
        with self.program.graph.inserting_before(first):
            node = self.program.graph.placeholder(f"x{len(self.inputs)}")
        node.meta = {"val": mode.from_tensor(value), "module_path": "", "from_node": []}
        self.inputs.insert(0, value)
        return node

    def x(self, *shape: int) -> Node:
        shape = shape or (self.sizes.batch, self.sizes.length, 5)
        return self.given(self.numbers(*shape))

    def weight(self, name: str, *shape: int) -> Node:
        return self.build.weight(name, self.numbers(*shape))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.build.call(target, *args, **kwargs)

    def linear(self, name: str, x: Node, out: int | None = None, bias: bool = True) -> Node:
        into, out = x.meta["val"].shape[-1], out or self.sizes.width
        weight = self.weight(f"{name}.weight", out, into)
        return self.call(
            aten.linear.default, x, weight, self.weight(f"{name}.bias", out) if bias else None
        )

    def finish(self, *results: Node) -> Program:
        self.output.args = (tuple(results),)
        specs = tuple(
            TensorSpec(f"out{i}", tuple(r.meta["val"].shape), torch.float64)
            for i, r in enumerate(results)
        )
        self.program.signature = Signature((), specs, {}, {})
        self.program.graph_module.recompile()
        return self.program

    # --- graphs in which an operator can stand ------------------------------------------------

    def split_heads(self, x: Node, heads: int) -> Node:
        s = self.sizes
        apart = self.call(aten.view.default, x, [s.batch, s.length, heads, s.dim])
        return self.call(aten.transpose.int, apart, 1, 2)

    def projected(self, role: str, x: Node) -> Node:
        """Queries, keys or values [B, H, S, D] from a linear called after them."""
        heads = self.sizes.heads * (self.sizes.group if role == "query" else 1)
        return self.split_heads(self.linear(role, x, heads * self.sizes.dim), heads)

    def attended(self, q: Node, k: Node, v: Node, mask: Node | None = None) -> Node:
        """Attention and the projection behind it, called "after"."""
        s = self.sizes
        out = self.call(fxopt.attention.default, q, k, v, None, mask, None, 0.5, False, None, None)
        rows = self.call(aten.transpose.int, out, 1, 2)
        merged = self.call(
            aten.reshape.default, rows, [s.batch, s.length, s.heads * s.group * s.dim]
        )
        return self.linear("after", merged)


Operator = Callable[[Bench, Node], Node]


def sandwich(op: Operator) -> Callable[[Bench], Sequence[Node]]:
    """linear -> op -> linear."""

    def build(g: Bench) -> Sequence[Node]:
        return [g.linear("after", op(g, g.linear("before", g.x())))]

    return build


def before_norm(op: Operator) -> Callable[[Bench], Sequence[Node]]:
    """linear -> op -> layer_norm -> linear: what a layer norm reads may be centred."""

    def build(g: Bench) -> Sequence[Node]:
        x = op(g, g.linear("before", g.x()))
        normed = g.call(aten.layer_norm.default, x, [int(x.meta["val"].shape[-1])])
        return [g.linear("after", normed)]

    return build


def on_values(op: Operator) -> Callable[[Bench], Sequence[Node]]:
    """Attention whose values [B, H, S, D] go through op."""

    def build(g: Bench) -> Sequence[Node]:
        x = g.x()
        q, k, v = (g.projected(role, x) for role in ("query", "key", "before"))
        return [g.attended(q, k, op(g, v))]

    return build
