"""Find the states of a decoder's cache by dataflow, and put others in their place."""

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic

from fxopt.errors import PassError
from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.operators.cache import TOKEN_FORMATS
from fxopt.ir.program import Program, Refusal, module_path, shape_of
from fxopt.ir.signature import CacheSpec, Dimension, TensorSpec
from fxopt.ir.state_form import StateForm
from fxopt.ir.text import format_size, size_names
from fxopt.passes.base import StateChange
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.sizes import fixed

aten = torch.ops.aten
ops = torch.ops.fxopt
BLOCKS, RESIDUAL = "blocks", "residual"


@dataclass(frozen=True)
class CacheState:
    """The keys, or the values, of one layer: `present = cat(past, new)` along the length.

    Attributes:
        place: which of the cache's states it is; keys and values of each layer in turn.
        past: the graph input.
        append: the node that adds the new tokens, which the graph also returns.
        heads: Hkv.
        width: D.
    """

    place: int
    past: Node
    append: Node
    heads: int
    width: int

    @property
    def values(self) -> bool:
        """Whether these are the values of a layer, and not its keys."""
        return self.place % 2 == 1

    @property
    def name(self) -> str:
        """The name of the graph input."""
        return self.past.name

    @property
    def path(self) -> str:
        """The module that appends."""
        return module_path(self.append)

    @property
    def reader(self) -> str:
        """The node that reads old and new tokens, by which the cost of a site is measured."""
        readers = [user for user in self.append.users if user.op == "call_function"]
        return readers[0].name if readers else ""

    @property
    def new(self) -> Node:
        """The keys or values of this call's tokens."""
        parts: Any = self.append.args[0]
        return parts[1]


def cache_states(program: Program) -> list[CacheState | Refusal]:
    """Every state of the cache, or why it cannot be held in another form."""
    cache = program.signature.cache
    if cache is None:
        return []
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    results: Any = program.graph.output_node().args[0]
    pairs = zip(cache.split(placeholders), cache.split(results), cache.states, strict=True)
    return [_state(i, past, present, form) for i, (past, present, form) in enumerate(pairs)]


def _state(
    place: int, past: list[Node], present: list[Node], form: StateForm
) -> CacheState | Refusal:
    name = past[0].name
    if form.dtype:
        return Refusal(name, f"it is held as {form.describe()} already")
    append = present[0]
    shape = shape_of(past[0])
    if not _appends(append, past[0]):
        return Refusal(
            name,
            "what the graph returns for it is not the old tokens followed by the new ones along "
            "axis 2, so tokens that are quantized could change later",
        )
    others = [u for u in past[0].users if u is not append and u.target is not aten.sym_size.int]
    if others:
        return Refusal(name, f"{others[0].name} reads the old tokens without the new ones")
    heads, width = fixed(shape[1]), fixed(shape[3])
    if heads is None or width is None:
        return Refusal(name, f"its shape {list(shape)} has heads or channels that vary")
    return CacheState(place, past[0], append, heads, width)


def _appends(node: Node, past: Node) -> bool:
    if node.target is not aten.cat.default or len(shape_of(past)) != 4:
        return False
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    new = len(parts) == 2 and parts[0] is past and parts[1] is not past  # type: ignore[arg-type,index]
    return new and axis in (2, -2)


# --- another form ---------------------------------------------------------------------------


def replace_states(
    program: Program, chosen: Sequence[tuple[CacheState, StateForm]], scales: str
) -> dict[str, StateChange]:
    """Hold some states in other forms; returns how a dense one is brought there, by its input."""
    old = program.signature
    assert old.cache is not None  # noqa: S101 - the states come from it
    forms, pasts = list(old.cache.states), old.cache.split(old.inputs)
    presents = old.cache.split(_results(program))
    names = [[spec.name for spec in specs] for specs in old.cache.split(old.outputs)]
    sizes = _Sizes(program)
    changes: dict[str, StateChange] = {}
    for state, form in chosen:
        place = state.place
        changes[state.name] = partial(_held, form, specs := sizes.specs(state, form, scales))
        nodes = _inputs(program, state, specs, sizes)
        presents[place] = _rewrite(program, state, form, nodes)
        names[place] = [f"{names[place][0]}_{part}" for part in form.parts]
        forms[place], pasts[place] = form, specs
    rest = len(old.outputs) - old.cache.count
    program.graph.output_node().args = (
        (*_results(program)[:rest], *(node for nodes in presents for node in nodes)),
    )
    for state, _ in chosen:
        erase_dead([state.append])
        program.graph.erase_node(state.past)
    _infer_again(program)
    _describe(program, CacheSpec(old.cache.layers, tuple(forms)), pasts, names)
    program.examples = [program.signature.hold(values) for values in program.examples]
    return changes


def _results(program: Program) -> tuple[Node, ...]:
    results: Any = program.graph.output_node().args[0]
    return tuple(results)


def _held(form: StateForm, specs: Sequence[TensorSpec], dense: Tensor) -> list[Tensor]:
    """A dense state in another form."""
    empty = [spec.empty(dense.shape[0], dense.device) for spec in specs]
    return form.append(empty, dense)


class _Sizes:
    """The shapes of new states, and the symbols that stand for the sizes that vary in them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mode = fake_mode(program)
        self.symbols: dict[Dimension, Any] = {}

    def specs(self, state: CacheState, form: StateForm, scales: str) -> list[TensorSpec]:
        """The graph inputs that take the place of a dense one."""
        old = next(s for s in self.program.signature.inputs if s.name == state.name)
        recorded = shape_of(state.past)
        self.symbols |= {old.shape[0]: recorded[0], old.shape[2]: recorded[2]}
        dtype = old.dtype if scales == "model" else getattr(torch, scales)
        front = (old.shape[0], state.heads)
        shapes = _shapes(state, form, old.shape[2])
        kinds = _dtypes(form, dtype, old.dtype)
        if form.bits:
            self._add_blocks(recorded[2])
        return [
            TensorSpec(f"{state.name}_{part}", (*front, *shape), kind)
            for part, shape, kind in zip(form.parts, shapes, kinds, strict=True)
        ]

    def _add_blocks(self, past: Any) -> None:
        # At the sizes of the capture every old token is in the residual, so that all sizes that
        # follow from their number stay what they were.
        env = self.mode.shape_env
        if env is None or BLOCKS in self.symbols:
            return
        self.symbols[RESIDUAL] = past
        source = ConstantSource(BLOCKS)
        symbol = env.create_symbol(
            0,
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            positive=None,
            do_not_specialize_zero_one=True,
        )
        self.symbols[BLOCKS] = env.create_symintnode(symbol, hint=0, source=source)

    def fake(self, spec: TensorSpec, device: torch.device) -> Tensor:
        """The recorded value of an input."""
        shape = [self.symbols.get(size, size) for size in spec.shape]
        with self.mode:
            return torch.empty(shape, dtype=spec.dtype, device=device)


def _shapes(state: CacheState, form: StateForm, length: Dimension) -> list[tuple[Dimension, ...]]:
    """The shape of each part, from axis 2 on."""
    if not form.bits:
        return [(length, state.width), (length, 1)]
    window, width = form.window, state.width
    by_token, by_channel = (window, width // form.group), (window // form.group, width)
    scale = (BLOCKS, *(by_channel if form.per_channel else by_token))
    return [(BLOCKS, window, width * form.bits // 8), scale, scale, (RESIDUAL, width)]


def _dtypes(form: StateForm, scales: torch.dtype, dense: torch.dtype) -> list[torch.dtype]:
    if form.bits:
        return [torch.uint8, scales, scales, dense]
    return [TOKEN_FORMATS[form.dtype].storage, scales]


def _inputs(
    program: Program, state: CacheState, specs: Sequence[TensorSpec], sizes: _Sizes
) -> list[Node]:
    nodes: list[Node] = []
    with program.graph.inserting_before(state.past):
        for spec in specs:
            node = program.graph.placeholder(spec.name)
            if node.name != spec.name:
                raise PassError(
                    f"the graph has a node called {spec.name!r} already, so an input of that name "
                    "cannot be added. Capture the model again and run this pass first."
                )
            node.meta = dict(state.past.meta)
            node.meta["val"] = sizes.fake(spec, state.past.meta["val"].device)
            nodes.append(node)
    return nodes


def _rewrite(
    program: Program, state: CacheState, form: StateForm, nodes: Sequence[Node]
) -> list[Node]:
    """Read and extend a state in its new form; returns what the graph gives back."""
    build = Builder(program, state.append, "quantize-cache")
    new = state.new
    if form.bits:
        reads = build.call(ops.cache_read_group.default, *nodes, new, form.bits, form.per_channel)
        options = (form.bits, form.group, form.per_channel)
        made = build.call(ops.cache_append_group.default, *nodes, new, *options)
    else:
        reads = build.call(ops.cache_read_token.default, *nodes, new)
        made = build.call(ops.cache_append_token.default, *nodes, new, form.dtype)
    present = [build.call(operator.getitem, made, index) for index in range(len(nodes))]
    state.append.replace_all_uses_with(reads)
    for size in list(state.past.users):
        if size.target is aten.sym_size.int:
            _replace_size(program, size, form, nodes)
    return present


def _replace_size(program: Program, size: Node, form: StateForm, nodes: Sequence[Node]) -> None:
    """Ask the new tensors for a size that the graph asked the dense one for."""
    build = Builder(program, size, "quantize-cache")
    axis: Any = size.args[1]
    dense = nodes[form.dense_part]
    if axis % 4 != 2 or not form.bits:
        found: Any = build.call(aten.sym_size.int, dense, axis)
    else:
        blocks = build.call(aten.sym_size.int, nodes[0], 2)
        tokens = build.call(operator.mul, blocks, form.window)
        found = build.call(operator.add, tokens, build.call(aten.sym_size.int, dense, 2))
    size.replace_all_uses_with(found)
    program.graph.erase_node(size)


def _infer_again(program: Program) -> None:
    mode = fake_mode(program)
    for node in program.nodes():
        node.meta["val"] = infer(node, mode)


def _describe(
    program: Program,
    cache: CacheSpec,
    pasts: Sequence[Sequence[TensorSpec]],
    names: Sequence[Sequence[str]],
) -> None:
    """Write the signature of the rewritten graph."""
    old = program.signature
    count = old.cache.count if old.cache else 0
    inputs = (*old.inputs[: len(old.inputs) - count], *(spec for specs in pasts for spec in specs))
    steps = [name for name in old.step_inputs if name in {spec.name for spec in inputs}]
    if old.step_inputs:
        steps += [s.name for specs in pasts for s in specs if s.name not in steps]
    program.signature = dataclasses.replace(
        old, inputs=inputs, cache=cache, step_inputs=tuple(steps)
    )
    symbols = size_names(program)
    results = cache.split(_results(program))
    outputs = [
        TensorSpec(
            name,
            tuple(
                n if (n := fixed(size)) is not None else format_size(size, symbols)
                for size in shape_of(node)
            ),
            node.meta["val"].dtype,
        )
        for nodes, held in zip(results, names, strict=True)
        for node, name in zip(nodes, held, strict=True)
    ]
    rest = old.outputs[: len(old.outputs) - count]
    program.signature = dataclasses.replace(program.signature, outputs=(*rest, *outputs))
