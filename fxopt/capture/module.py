"""Capture any nn.Module from example inputs: nested, positional or by keyword."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxopt.capture.check import Comparison, compare_outputs, run_graph
from fxopt.capture.evaluation import evaluation_mode
from fxopt.capture.export import dimensions, export_flat, readable_dimensions
from fxopt.capture.model_check import refuse_nan_inputs
from fxopt.capture.originals import left_as_it_was
from fxopt.capture.ranges import size_ranges, without_disproved
from fxopt.capture.tensors import take_cyclic
from fxopt.errors import CaptureError, InputError
from fxopt.ir.program import Program
from fxopt.ir.signature import Signature, TensorSpec
from fxopt.ir.structure import Structure, flatten, leaf_names, unflatten


def capture_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Capture a module and check the graph against it at several sizes.

    Every dimension that the module itself does not fix may vary afterwards, as far as the graph
    is the module. An axis along which every input of the example has size one is tried at size two
    first, since an export would fix it.

    Raises:
        InputError: the module does not run on the example.
        CaptureError: it cannot be exported, or its graph differs from it.
    """
    with left_as_it_was(module), evaluation_mode(module):
        return _ModuleCapture(module, args, kwargs).run()


class _ModuleCapture:
    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.leaves: list[Tensor] = []
        self.input_structure = flatten((args, kwargs), self.leaves, "example_inputs")
        if not self.leaves:
            raise InputError(
                f"example_inputs for {type(module).__name__} hold no tensor. Pass a tuple of "
                "positional arguments or a dict of keyword arguments, as in "
                "fxopt.optimize(model, recipe, example_inputs=(x,))."
            )
        self.names = _unique_names(self.input_structure)
        refuse_nan_inputs(self.names, self.leaves)
        self.output_structure: Structure = {}
        self.module_forward: Callable[..., Any] = module.forward

    def run(self) -> Program:
        flat = self._enlarged()
        graph_module, aliases, facts = export_flat(
            self.module,
            lambda *tensors: self._call(self.module_forward, list(tensors)),
            dict(zip(self.names, flat, strict=True)),
        )
        graph = graph_module.graph
        symbols = readable_dimensions(graph, dict.fromkeys(self.names, ("batch",)))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        results: Any = graph.output_node().args[0]
        signature = Signature(
            inputs=tuple(_spec(node.name, node, symbols) for node in placeholders),
            outputs=tuple(
                _spec(name, node, symbols)
                for name, node in zip(leaf_names(self.output_structure), results, strict=True)
            ),
            input_structure=self.input_structure,
            output_structure=self.output_structure,
            parameters=tuple(inspect.signature(self.module_forward).parameters),
            ranges=size_ranges(facts, graph, symbols),
        )
        program = Program(graph_module, signature, aliases=aliases)
        self._check(program, flat)
        self._refuse_own_example(program.signature)
        return program

    def _call(self, function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs = unflatten(self.input_structure, tensors)
        leaves: list[Tensor] = []
        self.output_structure = flatten(function(*args, **kwargs), leaves, "the module's result")
        return leaves

    @torch.no_grad()
    def _eager(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._call(self.module, [tensor.clone() for tensor in tensors])

    def _enlarged(self) -> list[Tensor]:
        for axes in ((0, 1), (0,), ()):
            flat = _at_least_two(self.leaves, axes)
            try:
                self._eager(flat)
            except CaptureError:
                raise  # what the module returns cannot be captured at any size
            except Exception as error:
                if not axes:
                    raise InputError(
                        f"{type(self.module).__name__} fails on its example_inputs "
                        f"{_shapes(self.names, self.leaves)}: {type(error).__name__}: {error}"
                    ) from error
            else:
                return flat
        raise InputError("no example ran")  # pragma: no cover - the loop returns or raises

    def _check(self, program: Program, flat: list[Tensor]) -> None:
        done: list[Comparison] = []
        checked: list[list[Tensor]] = []
        for change in _CHANGES:
            tensors = _resized(program.graph, flat, change)
            try:
                expected = self._eager(tensors)
            except Exception:
                continue  # the module itself does not take these sizes
            try:
                done.append(self._compare(program, tensors, expected))
            except CaptureError:
                if change is _same or program.signature.accepts(tensors):
                    raise
                continue  # the range is right: the graph is not the module there
            checked.append(tensors)
            if change is not _far:  # every pass is judged on the examples: small ones will do
                program.examples.append([tensor.clone() for tensor in tensors])
        ranges = without_disproved(program.signature, checked)
        program.signature = replace(program.signature, ranges=ranges)
        exact = sum(comparison.bit_equal for comparison in done)
        program.examples[1:1] = self._varied(program, flat)
        program.notes.append(
            f"capture checked against the model on {len(done)} runs: {exact} bit-equal, largest "
            f"error {max(comparison.error for comparison in done):.2g} of the output's rms"
        )

    def _varied(self, program: Program, flat: list[Tensor]) -> list[list[Tensor]]:
        """One more input to compare programs on, none where the module takes no such thing.

        An example of zeros or ones hides a mask, and one whose rows are alike an order: here all
        rows differ, and sizes that may differ do.
        """
        for spread in (1, 0):
            moved = count(2, spread)
            sizes = _resized(program.graph, flat, lambda size, _, moved=moved: size + next(moved))
            generator = torch.Generator().manual_seed(0)
            tensors = [_shuffled(tensor, generator) for tensor in sizes]
            try:
                eager = self._eager(tensors)
                with torch.no_grad():
                    program.graph_module(*(tensor.clone() for tensor in tensors))
            except Exception:
                continue  # sizes or values that belong together
            if not any(bool(torch.isnan(value).any()) for value in eager):
                return [tensors]
        return []

    def _compare(
        self, program: Program, tensors: list[Tensor], expected: list[Tensor]
    ) -> Comparison:
        label = _shapes(self.names, tensors)
        got = run_graph(program, tensors, label)
        names = [spec.name for spec in program.signature.outputs]
        return compare_outputs(label, names, got, expected)

    def _refuse_own_example(self, signature: Signature) -> None:
        try:
            signature.check(self.leaves)
        except InputError as error:
            raise CaptureError(
                f"the graph of {type(self.module).__name__} does not take its own example_inputs "
                f"{_shapes(self.names, self.leaves)}: {error}"
            ) from error


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a tensor's scale and sign; integers, which may be indices, in new order."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    if tensor.is_floating_point():
        finite = torch.isfinite(tensor)
        real = torch.where(finite, tensor, 0).double()
        scale = float(real.square().mean().sqrt()) or 1.0
        made = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
        made = made.abs() if bool((real >= 0).all()) and bool((real > 0).any()) else made
        return torch.where(finite, made.to(tensor), tensor)
    if tensor.is_complex():
        parts = _shuffled(torch.view_as_real(tensor.resolve_conj()), generator)
        return torch.view_as_complex(parts)
    # Within each row, so that a mask hides no more of it; between rows where they are single.
    rows = tensor if tensor.shape[-1] > 1 else tensor.flatten()
    order = torch.rand(rows.shape, generator=generator).argsort(-1).to(tensor.device)
    return rows.gather(-1, order).view(tensor.shape)


def _spec(name: str, node: Node, symbols: dict[str, str]) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name, dimensions(value, symbols), value.dtype)


def _unique_names(structure: Structure) -> list[str]:
    """Argument names for the graph: `arg0`, or the keyword's own name."""
    names: list[str] = []
    for path in leaf_names(structure):
        side, _, rest = path.partition(".")
        name = rest.replace(".", "_")
        names.append(f"arg{name}" if side == "0" else name)
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _at_least_two(tensors: list[Tensor], axes: tuple[int, ...]) -> list[Tensor]:
    """The example without axes of size one, which an export would fix.

    Where another input is longer, an axis of size one is there to be broadcast, and stays.
    """
    for axis in axes:
        if all(t.shape[axis] == 1 for t in tensors if axis < t.dim()):
            tensors = [take_cyclic(t, axis, 2) if axis < t.dim() else t for t in tensors]
    return [tensor.detach().clone().contiguous() for tensor in tensors]


def _far(size: int, is_batch: bool) -> int:
    """Well past the example along everything but the batch, and still cheap."""
    return min(size, 2) if is_batch else min(4 * size, size + 256)


def _same(size: int, is_batch: bool) -> int:
    del is_batch
    return size


# How the example's sizes are changed for a check of the graph: told a size, and whether it is
# the first axis of an input while there are others.
_Change = Callable[[int, bool], int]
_CHANGES: tuple[_Change, ...] = (
    _same,
    lambda size, is_batch: size + 3,
    lambda size, is_batch: 1,
    lambda size, is_batch: size + 5,
    _far,
)


def _resized(graph: Graph, flat: list[Tensor], change: _Change) -> list[Tensor]:
    """The example with every dynamic dimension moved."""
    if change is _same:
        return flat
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    sizes: dict[Any, int] = {}
    first: set[Any] = set()
    for node, tensor in zip(placeholders, flat, strict=True):
        for axis, dimension in enumerate(node.meta["val"].shape):
            if not isinstance(dimension, int) and dimension.node.expr.is_Symbol:
                sizes[dimension.node.expr] = tensor.shape[axis]
                first |= {dimension.node.expr} if axis == 0 else set()
    batch = first if sizes.keys() - first else set[Any]()
    sizes = {symbol: change(size, symbol in batch) for symbol, size in sizes.items()}
    moved: list[Tensor] = []
    for node, tensor in zip(placeholders, flat, strict=True):
        for axis, dimension in enumerate(node.meta["val"].shape):
            if not isinstance(dimension, int):
                size = int(dimension.node.expr.subs(sizes))
                tensor = take_cyclic(tensor, axis, size)
        moved.append(tensor)
    return moved


def _shapes(names: list[str], tensors: list[Tensor]) -> str:
    parts = (f"{name} {list(t.shape)}" for name, t in zip(names, tensors, strict=True))
    return ", ".join(parts)


def split_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (positional, keyword) arguments.

    Raises:
        InputError: they are neither a tuple, a list, a mapping nor a tensor.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise InputError(
        f"example_inputs is a {type(example).__name__}; pass a tuple of positional arguments or "
        "a dict of keyword arguments."
    )
