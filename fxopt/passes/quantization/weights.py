"""How a quantized weight is held: packed codes, scales and tables, and the nodes that read them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import CONSTANTS, Program
from fxopt.passes.quantization.grid import Grid, encoded, output_loss
from fxopt.passes.quantization.options import WeightOptions
from fxopt.rewrite.builder import Builder, free_name

ops = torch.ops.fxopt
aten = torch.ops.aten
Kind = Literal["linear", "embedding", "experts"]
# What has weights, and which arguments they are: [out, in], or of experts [E, out, in].
_WEIGHTS: dict[Any, tuple[Kind, tuple[int, ...]]] = {
    aten.linear.default: ("linear", (1,)),
    aten.embedding.default: ("embedding", (0,)),
    ops.moe.default: ("experts", (3, 4)),
}


@dataclass(frozen=True)
class StoredWeight:
    """The names under which a quantized weight is held, and its grid."""

    name: str
    grid: Grid
    columns: int


def weight_node(node: Node, index: int) -> Node | None:
    """The `get_attr` node of a weight operand, or None."""
    weight = node.args[index]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def weight_name(linear: Node) -> str:
    """The name under which the weight of a linear is held."""
    weight: Any = linear.args[1]
    return str(weight.target)


def kind_of(node: Node) -> Kind | None:
    """Whether a node is a linear, an embedding or a mixture of experts."""
    return _WEIGHTS[node.target][0] if node.target in _WEIGHTS else None


def weight_indices(node: Node) -> tuple[int, ...]:
    """Which arguments of a linear, an embedding or a mixture of experts are its weights."""
    return _WEIGHTS[node.target][1]


def quantize_weight(
    program: Program,
    build: Builder,
    node: Node,
    index: int,
    options: WeightOptions,
    done: dict[tuple[Any, ...], StoredWeight],
    rows: Tensor | None = None,
) -> Node:
    """Round the weight that is one argument of a node to its grid; the node that gives its values.

    `rows` [n, in] of the linear's input are what `range: output` judges by. A tied weight that two
    sites quantize alike stays one tensor. While another site still reads the floating weight, the
    codes get a name of their own.
    """
    source = weight_node(node, index)
    assert source is not None  # noqa: S101 - `unquantizable` looked
    name = str(source.target)
    value = program.weight(name)
    key = (name, options)
    if key not in done:
        loss = None if rows is None else output_loss(rows.T @ rows, options.block)
        grid, codes = encoded(value, options, loss)
        done[key] = store_weight(program, name, codes, grid)
    return read_weight(build, done[key], value.dtype)


def store_weight(program: Program, name: str, codes: Tensor, grid: Grid) -> StoredWeight:
    """Hold the codes [..., out, in] of a weight, packed where they have less than 8 bits."""
    stored = free_name(program, f"{name}_{grid.format.name}")
    bits = grid.format.bits
    program.set_weight(stored, codes if bits == 8 else ops.pack(codes, bits))
    program.set_weight(f"{stored}_scale", grid.scale)
    if grid.zero_point is not None:
        program.set_weight(f"{stored}_zero_point", grid.zero_point)
    table = _table_name(grid)
    if grid.format.kind == "codebook" and table not in program.weights():
        one = [1] * len(grid.block)
        program.set_weight(table, grid.format.codebook().reshape(*one, -1))
    return StoredWeight(stored, grid, codes.shape[-1])


def _table_name(grid: Grid) -> str:
    """Tables have the axes of what is looked up in them."""
    experts = "_of_experts" * (len(grid.block) > 2)
    return f"{CONSTANTS}{grid.format.name}_table{experts}"


def read_weight(build: Builder, stored: StoredWeight, dtype: torch.dtype) -> Node:
    """The nodes that read a stored weight: unpack, look up, dequantize."""
    grid = stored.grid
    node = build.read(stored.name)
    if grid.format.bits < 8:
        bits, signed = grid.format.bits, grid.format.signed
        node = build.call(ops.unpack.default, node, bits, stored.columns, signed)
    if grid.format.kind == "codebook":
        table = build.read(_table_name(grid))
        node = build.call(ops.lookup.default, node, table, [-1] * len(grid.block))
    zero = None if grid.zero_point is None else build.read(f"{stored.name}_zero_point")
    scale = build.read(f"{stored.name}_scale")
    return build.call(ops.dequantize.default, node, scale, zero, list(grid.block), dtype)
