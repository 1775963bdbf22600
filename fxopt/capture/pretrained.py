"""Capture an HF model: inputs found by themselves, its cache included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.exporters.utils import apply_patches

from fxopt.capture.attention import IMPLEMENTATION, attention_implementation
from fxopt.capture.cache import cache_from_tensors, tensors_from_cache
from fxopt.capture.check import Comparison, compare_outputs, refuse_other_count, run_graph
from fxopt.capture.evaluation import evaluation_mode
from fxopt.capture.export import (
    dimensions,
    export_flat,
    readable_dimensions,
)
from fxopt.capture.inputs import (
    BATCH,
    CAPTURE_SIZES,
    PAST,
    ExampleInputs,
    InputFactory,
    Sizes,
)
from fxopt.capture.originals import left_as_it_was
from fxopt.capture.ranges import SizeFacts, size_ranges, without_disproved
from fxopt.errors import CaptureError
from fxopt.ir.program import Program
from fxopt.ir.signature import CacheSpec, Signature, TensorSpec
from fxopt.ir.structure import Structure, flatten, leaf_names

# With cache and without, one row and several, one token and odd lengths.
CHECK_SIZES = (
    Sizes(batch=3, sequence=4, past=6, source=9),
    Sizes(batch=1, sequence=1, past=9, source=3),
    Sizes(batch=1, sequence=13, past=0, source=5),
    Sizes(batch=2, sequence=1, past=0, source=1),
)
FAR_SIZES = Sizes(batch=1, sequence=40, past=0, source=40)


def capture_pretrained(model: PreTrainedModel, tensors: dict[str, Tensor] | None) -> Program:
    """Capture an HF model and check the graph against it.

    The first attempt takes attention, masks and experts whole; a model that builds them by hand
    is captured from its plain operators instead.

    Raises:
        InputError: no inputs were given and none could be made up.
        CaptureError: the model cannot be exported, or its graph differs from it.
    """
    with left_as_it_was(model), evaluation_mode(model):
        return _capture(model, tensors)


def _capture(model: PreTrainedModel, tensors: dict[str, Tensor] | None) -> Program:
    factory = InputFactory(model)
    factory.discover(tensors)
    no_cache = factory.discover_cache()
    attempts = [(IMPLEMENTATION, IMPLEMENTATION), (IMPLEMENTATION, "grouped_mm")]
    attempts += [("eager", "grouped_mm"), ("sdpa", "batched_mm")]
    failures: list[CaptureError] = []
    for attention, experts in attempts:
        try:
            program = _PretrainedCapture(model, factory, attention, experts).run()
        except CaptureError as error:
            failures.append(error)
            continue
        if no_cache is not None:
            program.notes.append(f"captured without a cache: {no_cache}")
        program.notes += _fixed_sizes(program)
        if attention != IMPLEMENTATION:
            program.notes.append(
                f"attention was captured as plain operators ({attention!r} implementation): the "
                "model does not go through transformers' attention interface"
            )
        return program
    raise failures[-1] from failures[0]


class _PretrainedCapture:
    def __init__(
        self, model: PreTrainedModel, factory: InputFactory, attention: str, experts: str
    ) -> None:
        self.model = model
        self.factory = factory
        self.attention = attention
        self.experts = experts
        self.structure: Structure = {}
        self.output_names: list[str] = []

    def run(self) -> Program:
        example = self.factory.make(CAPTURE_SIZES)
        names = list(example.tensors)
        past = _past_names(example.past)
        flat = {**example.tensors, **past}

        with (
            attention_implementation(self.model, self.attention, self.experts),
            apply_patches("dynamo"),
        ):
            wanted = dict(example.dimensions)
            wanted.update(dict.fromkeys(past, (BATCH, None, PAST, None)))
            graph_module, aliases, facts = export_flat(
                self.model, self._forward(names), flat, dynamic_axes(wanted)
            )
        signature = self._signature(graph_module, facts, example, names, list(past))
        program = Program(graph_module, signature, aliases=aliases)
        self._check(program)
        return program

    def _forward(self, names: list[str]) -> Callable[..., list[Tensor]]:
        original = self.model.forward

        def forward(*flat: Tensor) -> list[Tensor]:
            kwargs: dict[str, Any] = dict(zip(names, flat[: len(names)], strict=True))
            return self._call(original, kwargs, list(flat[len(names) :]))

        return forward

    def _call(
        self, function: Callable[..., Any], kwargs: dict[str, Any], past: list[Tensor]
    ) -> list[Tensor]:
        cache: Cache | None = None
        if self.factory.past_shapes:
            cache = cache_from_tensors(past, self.factory.encoder_decoder)
            kwargs = {**kwargs, str(self.factory.cache_parameter): cache, "use_cache": True}
        elif self.factory.takes_use_cache:
            kwargs = {**kwargs, "use_cache": False}
        output = without_caches(function(**kwargs))
        leaves: list[Tensor] = []
        self.structure = flatten(output, leaves, "the model's result")
        self.output_names = leaf_names(self.structure)
        return leaves + (tensors_from_cache(cache) if cache is not None else [])

    def _signature(
        self,
        graph_module: GraphModule,
        facts: SizeFacts,
        example: ExampleInputs,
        names: list[str],
        past: list[str],
    ) -> Signature:
        graph = graph_module.graph
        wanted = dict(example.dimensions)
        wanted.update(dict.fromkeys(past, (BATCH, None, PAST, None)))
        symbols = readable_dimensions(graph, wanted, shared=(PAST,))
        ignored = self._drop_ignored(graph)
        graph_module.recompile()
        names = [name for name in names if name not in ignored]
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = tuple(
            TensorSpec(node.name, dimensions(node.meta["val"], symbols), node.meta["val"].dtype)
            for node in placeholders
        )
        self._refuse_fixed(inputs, wanted)
        results = graph.output_node().args[0]
        layers = len(past) // 2
        output_names = self.output_names + [name.replace("past", "present") for name in past]
        outputs = tuple(
            TensorSpec(name, dimensions(node.meta["val"], symbols), node.meta["val"].dtype)
            for name, node in zip(output_names, results, strict=True)  # type: ignore[arg-type]
        )
        fields = [[name, {"kind": "tensor", "index": i}] for i, name in enumerate(names)]
        steps = [name for name in names if name.startswith("decoder_")] + past
        return Signature(
            inputs=inputs,
            outputs=outputs,
            input_structure={
                "kind": "tuple",
                "items": [{"kind": "tuple", "items": []}, {"kind": "dict", "items": fields}],
            },
            output_structure=self.structure,
            defaults={k: v for k, v in self.factory.defaults.items() if k in names},
            ignored=ignored,
            parameters=tuple(self.factory.parameters),
            cache=CacheSpec(layers) if layers else None,
            step_inputs=tuple(steps) if self.factory.encoder_decoder else (),
            ranges=size_ranges(facts, graph, symbols),
        )

    def _drop_ignored(self, graph: Graph) -> tuple[str, ...]:
        """Optional inputs that the model accepts and never reads are no inputs of the graph."""
        unread = [
            node
            for node in graph.nodes
            if node.op == "placeholder" and not node.users and node.name in self.factory.optional
        ]
        for node in unread:
            graph.erase_node(node)
        return tuple(node.name for node in unread)

    def _refuse_fixed(
        self, inputs: tuple[TensorSpec, ...], wanted: dict[str, tuple[str | None, ...]]
    ) -> None:
        for spec in inputs:
            for axis, name in enumerate(wanted.get(spec.name, ())):
                if name is not None and isinstance(spec.shape[axis], int):
                    raise CaptureError(
                        f"capture fixed dimension {axis} ({name}) of input {spec.name!r} to "
                        f"{spec.shape[axis]}: the model's Python code depends on its value."
                    )

    # --- check ------------------------------------------------------------------------------

    def _check(self, program: Program) -> None:
        comparisons: list[Comparison] = []
        for index, sizes in enumerate(CHECK_SIZES):
            example = self.factory.make(sizes, seed=index + 1)
            comparisons.append(self._compare(program, example, sizes, "no padding"))
            padded = self._pad(example)
            if padded:
                comparisons.append(self._compare(program, example, sizes, "padded"))
        ranges = without_disproved(program.signature, program.examples)
        program.signature = replace(program.signature, ranges=ranges)
        comparisons += self._far(program)
        exact = sum(comparison.bit_equal for comparison in comparisons)
        worst = max(comparison.error for comparison in comparisons)
        program.notes.append(
            f"capture checked against the model on {len(comparisons)} runs: {exact} bit-equal, "
            f"largest error {worst:.2g} of the output's rms"
        )

    def _far(self, program: Program) -> list[Comparison]:
        """The check well past the capture, if graph and model are meant to go so far."""
        example = self.factory.make(FAR_SIZES)
        if not program.signature.accepts(_flat(program.signature, example)):
            return []
        try:
            self.factory.run(example)
        except Exception:
            return []  # a table of the model ends before
        kept = list(program.examples)
        comparison = self._compare(program, example, FAR_SIZES, "no padding")
        program.examples = kept  # every pass is judged on the examples: small ones will do
        return [comparison]

    def _compare(
        self, program: Program, example: ExampleInputs, sizes: Sizes, label: str
    ) -> Comparison:
        description = (
            f"batch {sizes.batch}, length {sizes.sequence}, past "
            f"{sizes.past if example.past else 0}, {label}"
        )
        past = [t.clone() for t in example.past]
        with torch.no_grad():
            expected = self._call(self.model, dict(example.tensors), past)
        flat = _flat(program.signature, example)
        program.examples.append([tensor.clone() for tensor in flat])
        got = run_graph(program, flat, description)
        specs = program.signature.outputs
        refuse_other_count(description, got, expected)
        kept = [self._visible(spec, t, example) for spec, t in zip(specs, expected, strict=True)]
        return compare_outputs(
            description,
            [spec.name for spec in specs],
            [_select(t, keep) for t, keep in zip(got, kept, strict=True)],
            [_select(t, keep) for t, keep in zip(expected, kept, strict=True)],
        )

    def _visible(self, spec: TensorSpec, value: Tensor, example: ExampleInputs) -> Tensor | None:
        """Which entries of an output belong to real tokens: [B, 1, ..., length, ..., 1].

        What a model computes at a masked position that sees no key is arbitrary (zeros in one
        attention function, an average in another) and reaches no real token.
        """
        masks = [t for n, t in example.tensors.items() if n.endswith("attention_mask")]
        keep: Tensor | None = None
        for axis in range(1, value.dim()):
            if isinstance(spec.shape[axis], int):
                continue
            for mask in masks:
                size = value.shape[axis]
                if mask.shape[0] != value.shape[0] or mask.shape[1] < size:
                    continue
                view = [1] * value.dim()
                view[0], view[axis] = mask.shape[0], size
                here = mask[:, mask.shape[1] - size :].bool().reshape(view)
                keep = here if keep is None else keep & here
                break
        return keep

    def _pad(self, example: ExampleInputs) -> bool:
        """Mask out the beginning of the last row, in place; False where nothing can be masked."""
        done = False
        for name, tensor in example.tensors.items():
            if name.endswith("attention_mask") and tensor.dim() == 2 and tensor.shape[1] > 2:
                tensor[-1, : tensor.shape[1] // 3 or 1] = 0
                done = True
        return done


def dynamic_axes(wanted: dict[str, tuple[str | None, ...]]) -> dict[str, list[int]]:
    """The axes of each input that have a name, which is to say, may vary."""
    return {
        name: [axis for axis, dimension in enumerate(names) if dimension is not None]
        for name, names in wanted.items()
    }


def without_caches(output: Any) -> Any:
    """A model's result with every cache taken out."""
    if isinstance(output, dict):
        kept = {key: value for key, value in output.items() if not isinstance(value, Cache)}
        return type(output)(**kept) if type(output) is not dict else kept
    if isinstance(output, list | tuple):
        return type(output)(without_caches(v) for v in output if not isinstance(v, Cache))
    return output


def _past_names(past: list[Tensor]) -> dict[str, Tensor]:
    return {f"past_{'value' if i % 2 else 'key'}_{i // 2}": t for i, t in enumerate(past)}


def _flat(signature: Signature, example: ExampleInputs) -> list[Tensor]:
    known = {**example.tensors, **_past_names(example.past)}
    return [known[spec.name] for spec in signature.inputs]


def _select(value: Tensor, keep: Tensor | None) -> Tensor:
    return value if keep is None else torch.where(keep, value, 0)


__all__ = ["capture_pretrained", "without_caches"]


def _fixed_sizes(program: Program) -> list[str]:
    """What to know of images and sounds, whose size the graph has as it was in the example."""
    return [
        f"input {spec.name!r} is taken at {list(spec.shape)} alone; pass example_inputs of another "
        "size to capture the model at that"
        for spec in program.signature.inputs
        if spec.dtype.is_floating_point
        and not spec.name.startswith(PAST)
        and any(isinstance(size, int) for size in spec.shape[1:])
    ]
