"""Where quantization can act, and the nodes it puts there."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.errors import CalibrationError
from fxopt.ir.program import Program, dtype_of, shape_of
from fxopt.passes.base import Context
from fxopt.rewrite.builder import Builder

# int4 values are held one per byte.
INTEGER_RANGE = {"int8": (torch.int8, -128, 127), "int4": (torch.int8, -8, 7)}
# Without the smallest integer, so that negation stays exact.
SYMMETRIC_RANGE = {"int8": (torch.int8, -127, 127), "int4": (torch.int8, -7, 7)}


class WeightChoice(Protocol):
    """What a pass decides about a weight."""

    @property
    def dtype(self) -> str:
        """The integer type it is stored in."""
        ...

    @property
    def granularity(self) -> str:
        """What shares one scale."""
        ...

    @property
    def group_size(self) -> int | None:
        """Inputs that share one scale, for granularity "group"."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is zero."""
        ...


class ActivationChoice(Protocol):
    """What a pass decides about an activation."""

    @property
    def dtype(self) -> str:
        """The integer type it is rounded to."""
        ...

    @property
    def granularity(self) -> str:
        """What shares one scale."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is zero."""
        ...


@dataclass(frozen=True)
class QuantizedWeight:
    """The names under which a quantized weight is held."""

    name: str
    scale: str
    zero_point: str | None


def weight_node(node: Node, index: int) -> Node | None:
    """The `get_attr` node of a weight operand, or None."""
    weight = node.args[index]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def weight_paths(node: Node) -> list[str]:
    """The module path of the weight that a linear or embedding reads, for include and exclude."""
    index = 0 if node.target is torch.ops.aten.embedding.default else 1
    weight = weight_node(node, index)
    return [] if weight is None else [str(weight.target).rpartition(".")[0]]


def unquantizable(
    program: Program, node: Node, choice: WeightChoice, kind: Literal["linear", "embedding"]
) -> str | None:
    """Why a linear or embedding cannot be quantized, or None."""
    weight = weight_node(node, 0 if kind == "embedding" else 1)
    if weight is None:
        source: Any = node.args[0 if kind == "embedding" else 1]
        if isinstance(source, Node) and "dequantize" in str(source.target):
            return "already quantized"
        return "the weight is computed in the graph, not stored"
    value = program.weight(str(weight.target))
    if value.dim() != 2:
        return f"the weight has shape {list(value.shape)}; two axes are needed"
    if not value.is_floating_point():
        return f"the weight is {value.dtype}"
    if kind == "linear" and choice.granularity == "group":
        size = choice.group_size
        if size is None or size < 1 or value.shape[1] % size:
            return f"group size {size} does not divide its {value.shape[1]} inputs"
    return None


def quantize_weight(
    program: Program,
    build: Builder,
    node: Node,
    index: int,
    choice: WeightChoice,
    done: dict[tuple[Any, ...], QuantizedWeight],
) -> Node:
    """Store a weight as integers and return the node that dequantizes it.

    A tied weight that two sites quantize alike stays one tensor. While another site still reads
    the floating weight, the integers get a name of their own.
    """
    source = weight_node(node, index)
    assert source is not None  # noqa: S101 - `unquantizable` looked
    name = str(source.target)
    value = program.weight(name)
    block = _weight_block(choice)
    asked = (choice.dtype, choice.symmetric, tuple(block))
    held = done.get((name, *asked))
    if held is None:
        held = done[(name, *asked)] = _store(program, name, value, choice, block)
    quantized = build.read(held.name)
    return build.call(
        torch.ops.fxopt.dequantize.default,
        quantized,
        build.read(held.scale),
        None if held.zero_point is None else build.read(held.zero_point),
        block,
        value.dtype,
    )


def _weight_block(choice: WeightChoice) -> list[int]:
    if choice.granularity == "tensor":
        return [-1, -1]
    return [1, choice.group_size or -1] if choice.granularity == "group" else [1, -1]


def _store(
    program: Program, name: str, value: Tensor, choice: WeightChoice, block: list[int]
) -> QuantizedWeight:
    ranges = SYMMETRIC_RANGE if choice.symmetric else INTEGER_RANGE
    dtype, low, high = ranges[choice.dtype]
    integers, scale, zero_point = _quantize(value, choice.symmetric, block, dtype, low, high)
    stored = _free_name(program, f"{name}_{choice.dtype}")
    program.set_weight(stored, integers)
    program.set_weight(f"{stored}_scale", scale)
    if not choice.symmetric:
        program.set_weight(f"{stored}_zero_point", zero_point)
    zero = None if choice.symmetric else f"{stored}_zero_point"
    return QuantizedWeight(stored, f"{stored}_scale", zero)


# Quantizing makes several temporaries as large as what it is given; a slab keeps them small.
_SLAB_ELEMENTS = 1 << 16


def _slabs(value: Tensor, block: list[int]) -> tuple[Tensor, ...]:
    """The weight in runs of rows, where no block spans rows."""
    if block[0] == -1:
        return (value,)
    return value.split(max(1, _SLAB_ELEMENTS // max(1, value.shape[1])))


def _quantize(
    value: Tensor, symmetric: bool, block: list[int], dtype: torch.dtype, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    ops = torch.ops.fxopt
    integers = torch.empty(value.shape, dtype=dtype, device=value.device)
    qparams: list[tuple[Tensor, Tensor]] = []
    start = 0
    for rows in _slabs(value, block):
        scale, zero_point = ops.choose_qparams(rows, block, symmetric, low, high)
        zero = None if symmetric else zero_point
        part = integers[start : start + len(rows)]
        part.copy_(ops.quantize(rows, scale, zero, block, dtype, low, high))
        qparams.append((scale, zero_point))
        start += len(rows)
    scales, zero_points = zip(*qparams, strict=True)
    return integers, torch.cat(scales), torch.cat(zero_points)


def _free_name(program: Program, name: str) -> str:
    held = program.weights()
    candidate, number = name, 1
    while candidate in held:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def quantize_activation(
    build: Builder, node: Node, choice: ActivationChoice, context: Context
) -> Node:
    """Round a linear's input to integers and back, per token or per tensor."""
    source: Any = node.args[0]
    symmetric = choice.symmetric
    dtype, low, high = (SYMMETRIC_RANGE if symmetric else INTEGER_RANGE)[choice.dtype]
    rank = len(shape_of(source))
    ops = torch.ops.fxopt
    if choice.granularity == "token":
        block = [1] * (rank - 1) + [-1]
        qparams = build.call(ops.choose_qparams.default, source, block, symmetric, low, high)
        import operator

        scale = build.call(operator.getitem, qparams, 0)
        zero_point = None if symmetric else build.call(operator.getitem, qparams, 1)
    else:
        block = [-1] * rank
        scale, zero_point = _static_qparams(build, source, context, symmetric, low, high)
    integers = build.call(ops.quantize.default, source, scale, zero_point, block, dtype, low, high)
    return build.call(
        ops.dequantize.default, integers, scale, zero_point, block, dtype_of(source)
    )


def _static_qparams(
    build: Builder, source: Node, context: Context, symmetric: bool, low: int, high: int
) -> tuple[Node, Node | None]:
    try:
        minimum = context.statistics["minimum"][source.name].min()
        maximum = context.statistics["maximum"][source.name].max()
    except KeyError as error:
        raise CalibrationError(
            f"no calibration range for {source.name!r}: it was not reached by the calibration "
            "data. Pass calibration data that uses this part of the model."
        ) from error
    rank = len(shape_of(source))
    edges = torch.stack([minimum, maximum]).reshape([2] + [1] * (rank - 1))
    scale, zero_point = torch.ops.fxopt.choose_qparams(
        edges, [-1] * rank, symmetric, low, high
    )
    name = f"{source.name}_activation"
    scale_node = build.weight(f"{name}_scale", scale)
    if symmetric:
        return scale_node, None
    return scale_node, build.weight(f"{name}_zero_point", zero_point)
