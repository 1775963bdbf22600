"""Take removed coordinates out of a program: its weights, its caches, and the sizes it writes down.

    reshape(x, [B, S, 64])  ->  reshape(x, [B, S, 48]);   slice(x, 32, 64)  ->  slice(x, 24, 48)

Shapes: here an axis of 64 coordinates keeps 48 of them, 24 of each half.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.slicing import Cut, Removal
from fxopt.errors import AnalysisError
from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.program import Program, shape_of
from fxopt.ir.signature import TensorSpec

aten = torch.ops.aten
Arguments = dict[int, Any]  # new arguments of a node, by their place

_SIZED = (aten.reshape.default, aten.view.default, aten.expand.default)
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_REDUCTIONS = (
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.amax.default,
    aten.amin.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
)
_END = 2**62


def follow(removal: Removal, program: Program, norms: bool) -> dict[Node, Arguments]:
    """The literal sizes that change with what is removed.

    Args:
        removal: what is removed.
        program: the program that was analysed.
        norms: whether a norm may measure what is left of the axis.

    Raises:
        AnalysisError: something looks at the whole axis, or a size cannot be followed; the
            message is a reason for the user.
    """
    changed: dict[Node, Arguments] = {}
    for node in program.nodes():
        source = node.args[0] if node.args else None
        read, made = removal.of_node(source), removal.of_node(node)
        if isinstance(read, list) or (read is None and made is None):
            continue
        arguments = _arguments(node, read, made, norms)
        if arguments:
            changed[node] = arguments
    removal.entries()  # every tensor that holds it must be able to lose it
    return changed


def _arguments(node: Node, read: Cut | None, made: Any, norms: bool) -> Arguments:
    sized = _sizes(node, made) if node.target in _SIZED and isinstance(made, Cut) else {}
    if sized or read is None:
        return sized
    if node.target in _NORMS and read.axis == len(shape_of(node)) - 1:
        if not norms:
            raise AnalysisError(f"{node.name} measures all of the axis together")
        return {1: [read.count]}
    if node.target in _REDUCTIONS and read.axis in _reduced(node):
        raise AnalysisError(f"{node.name} looks at all of the axis together")
    if node.target is aten.slice.Tensor:
        return _bounds(node, read)
    if node.target is aten.select.int and _axis(node, 1) == read.axis:
        return _position(node, read)
    if node.target in _SPLITS and isinstance(made, list):
        return _lengths(node, read, made)  # pyright: ignore[reportUnknownArgumentType]
    return {}


def _sizes(node: Node, made: Cut) -> Arguments:
    sizes: Any = list(node.args[1])  # type: ignore[arg-type]
    if isinstance(sizes[made.axis], Node):
        raise AnalysisError(f"{node.name} computes the size of the axis when the model runs")
    if sizes[made.axis] == -1:
        return {}
    sizes[made.axis] = made.count
    return {1: sizes}


def _axis(node: Node, place: int) -> int:
    axis: Any = node.args[place] if len(node.args) > place else 0
    return axis % len(shape_of(node.args[0]))


def _reduced(node: Node) -> list[int]:
    rank = len(shape_of(node.args[0]))
    axes: Any = node.args[1] if len(node.args) > 1 else None
    listed = [axes] if isinstance(axes, int) else axes or range(rank)
    return [axis % rank for axis in listed]


def _bounds(node: Node, read: Cut) -> Arguments:
    arguments: Any = [*node.args, 0, None, None, 1][: 4 if len(node.args) < 5 else 5]
    if _axis(node, 1) != read.axis:
        return {}
    start, end = [*arguments, None, None][2:4]
    size = read.kept.shape[read.axis]
    step = arguments[4] if len(arguments) > 4 else 1
    if step != 1:
        raise AnalysisError(f"{node.name} takes every {step}th coordinate of the axis")
    low = 0 if start is None else min(max(start % size if start < 0 else start, 0), size)
    high = size if end is None or end > size else end + size if end < 0 else end
    return {2: read.before(low), 3: read.before(high)}


def _position(node: Node, read: Cut) -> Arguments:
    position: Any = node.args[2]
    size = read.kept.shape[read.axis]
    if not isinstance(position, int):
        raise AnalysisError(f"{node.name} takes a position that is computed when the model runs")
    position %= size
    if not read.kept.take(position, read.axis).all():
        raise AnalysisError(f"{node.name} reads a coordinate that would be removed")
    return {2: read.before(position)}


def _lengths(node: Node, read: Cut, made: Sequence[Cut | None]) -> Arguments:
    axis = _axis(node, 2)
    if axis != read.axis:
        return {}
    parts = [
        int(part.shape[axis]) if cut is None else cut.count
        for part, cut in zip(node.meta["val"], made, strict=True)
    ]
    return {1: parts, 2: axis}


# --- applying -------------------------------------------------------------------------------


def shrink(
    program: Program, removal: Removal, changed: dict[Node, Arguments]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Apply a removal that could be followed; returns how each cache becomes smaller, by input."""
    cuts = removal.entries()
    expected = {node: removal.of_node(node) for node in program.nodes()}
    for node, arguments in changed.items():
        for place, value in arguments.items():
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
        if node.target in _SPLITS:
            node.target = aten.split_with_sizes.default
    state: dict[str, Callable[[Tensor], Tensor]] = {}
    for entry, cut in cuts:
        if entry.role == "weight":
            program.set_weight(entry.name, cut.apply(program.weight(entry.name), entry.axes))
        else:
            state[entry.name] = _changer(cut, entry.axes)
            _narrow_input(program, entry.name, entry.axes[cut.axis], cut.count)
    _infer_again(program, expected)
    _fit_signature(program)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    program.examples = [
        [state[n](v) if n in state else v for n, v in zip(names, values, strict=True)]
        for values in program.examples
    ]
    return state


def _changer(cut: Cut, axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda value: cut.apply(value, axes)


def _narrow_input(program: Program, name: str, axis: int, count: int) -> None:
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == name)
    with fake_mode(program):
        node.meta["val"] = node.meta["val"].narrow(axis, 0, count)


def _infer_again(program: Program, expected: dict[Node, Any]) -> None:
    mode = fake_mode(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            weight = program.weight(str(node.target))
            if weight.shape != node.meta["val"].shape:
                node.meta["val"] = mode.from_tensor(weight, static_shapes=True)
        elif node.op == "call_function":
            node.meta["val"] = infer(node, mode)
            cut = expected.get(node)
            if isinstance(cut, Cut) and shape_of(node)[cut.axis] != cut.count:
                raise AnalysisError(
                    f"{node.name} was to keep {cut.count} coordinates along axis {cut.axis} and "
                    f"has shape {list(shape_of(node))}; a size in the graph was not followed."
                )


def _fit_signature(program: Program) -> None:
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    results: Any = program.graph.output_node().args[0]
    program.signature = dataclasses.replace(
        program.signature,
        inputs=_fitted(program.signature.inputs, inputs),
        outputs=_fitted(program.signature.outputs, results),
    )


def _fitted(specs: Sequence[TensorSpec], nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    result: list[TensorSpec] = []
    for spec, node in zip(specs, nodes, strict=True):
        sizes = [
            int(new) if isinstance(old, int) else old
            for old, new in zip(spec.shape, shape_of(node), strict=True)
        ]
        result.append(dataclasses.replace(spec, shape=tuple(sizes)))
    return tuple(result)
