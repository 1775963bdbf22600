"""GPTQ: round weights so that the outputs of linears, not the weights, stay close.

    minimize || Y V^T - Y Q^T ||^2 over Q on the grid, column by column (see compensation)

Shapes: Y [tokens, in] of the calibration data; V and Q [out, in]. Of experts [E, out, in] each is
    rounded by the tokens Y_e that the router sends it; one that is sent none is rounded to nearest.
    With `range: output` the grid of a block is that of the least error in the output when its
    weights are rounded to nearest, found before or, without static groups, as columns reach it.
Exactness: approximate; on the calibration data no output errs more than with its row rounded to
    nearest. Y is what the already rounded linears before it give (`true_sequential`), or what the
    original model gives. V is the original weight W, or with `match_original` the one whose outputs
    on Y are nearest to those of the original model, W on its own inputs (see original_inputs). The
    model runs over the data once, node by node, with `match_original` beside the original, and
    holds one Hessian. A weight that several linears read is rounded by the inputs that all of them
    have in the original model, in a run of its own. With `bias_correction` the mean output over the
    data is that of W on Y, with `match_original` that of W on its own inputs; biases of experts
    stay.
Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, ICLR 2023, arXiv:2210.17323; Li et al., GPTAQ: Efficient Finetuning-Free
    Quantization for Asymmetric Calibration, ICML 2025, arXiv:2504.02692 (`match_original`).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from fxopt.analysis.lockstep import Lockstep
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Level, Program, Refusal, Site, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.activations import quantize_activation, reads_rounded
from fxopt.passes.quantization.bias_correction import correct_bias
from fxopt.passes.quantization.compensation import Hessian, factorized
from fxopt.passes.quantization.gptq_experts import ExpertRounding, expert_of, sent_to
from fxopt.passes.quantization.grid import encode_by_rows
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.original_inputs import OriginalInputs
from fxopt.passes.quantization.parts import store_parts
from fxopt.passes.quantization.seen_inputs import ColumnRounding, Rows, SeenInputs
from fxopt.passes.quantization.shared_inputs import SharedInputs
from fxopt.passes.quantization.sites import (
    allocated,
    mark_heads,
    not_selected,
    other_weights,
    unquantizable,
    weight_options,
)
from fxopt.passes.quantization.weights import (
    StoredWeight,
    kind_of,
    read_weight,
    store_weight,
    weight_indices,
    weight_node,
)
from fxopt.rewrite.builder import Builder

_ROUNDED = ("linear", "experts")
# Bytes of rounded weights after which freed memory is handed back, which takes half a second.
_FREED = 64 << 20
_BY_TOKENS = " and rounded for the tokens of that one"


@register("gptq")
@dataclass(frozen=True)
class Gptq(Pass):
    """Store weights of linears and experts in few bits, errors made up for by later columns."""

    weights: WeightOptions = field(default_factory=lambda: WeightOptions("int4", "group", 64))
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    match_original: bool = True
    block_size: int = 128
    damping: float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    bias_correction: bool = False

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    after = ("canonicalize",)

    def __post_init__(self) -> None:
        self.check_order(self.weights)
        if self.block_size < 1 or not self.damping > 0:
            raise RecipeError(
                f"block_size {self.block_size} and damping {self.damping} must be positive."
            )

    def check_order(self, weights: WeightOptions) -> None:
        """Refuse groups whose ranges would wait for columns in an order of their own."""
        grouped = weights.granularity in ("group", "block", "head")
        if self.act_order and grouped and not self.static_groups:
            raise RecipeError(
                "act_order scatters the columns of a group over the order of rounding, so its "
                "range cannot wait for them. Set static_groups: true or act_order: false."
            )

    def needs(self) -> tuple[Calibration, ...]:
        """The calibration data itself: inputs are those that rounded linears give."""
        return (Calibration("samples"),)

    def run(self, program: Program, context: Context) -> PassResult:
        """Round what is selected while the calibration data flows through the program."""
        store_parts(program, self.include, self.exclude, self.name)
        mark_heads(program, self.weights)
        rounding = _Rounding(self, program, context)
        with contextlib.closing(rounding):
            rounding.lockstep.run(rounding.visit, rounding.rounded(), context.recorder)
        return PassResult(
            tuple(rounding.sites),
            tuple(rounding.refusals + other_weights(program)),
            tuple(dict.fromkeys(rounding.notes)),
            activations={},
        )


class _Rounding:
    """One run of the pass over a program."""

    def __init__(self, settings: Gptq, program: Program, context: Context) -> None:
        self.settings = settings
        self.program = program
        self.context = context
        self.lockstep = Lockstep(program, context.samples)
        self.rounding = ColumnRounding(
            settings.damping,
            settings.act_order,
            settings.block_size,
            settings.static_groups,
            settings.true_sequential,
        )
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.notes: list[str] = []
        self.done: dict[str, StoredWeight] = {}
        self.freed = 0  # bytes of weights, each of which needed temporary ones as large
        # Linears that share an input follow each other.
        self.latest: tuple[Node, SeenInputs] | None = None
        linears = self.rounded()
        matched = settings.match_original and settings.true_sequential
        self.shared = SharedInputs(program, context.samples, linears)
        self.original = OriginalInputs(program, context.samples, linears) if matched else None

    def close(self) -> None:
        """Give up what is held of the data."""
        if self.original is not None:
            self.original.close()

    def visit(self, node: Node) -> None:
        """Round a linear or experts before they are computed, or (not true_sequential) after."""
        if kind_of(node) not in _ROUNDED:
            return
        path = module_path(node) or node.name
        settings = self.settings
        options = self._options(node)
        if isinstance(options, str):
            self.refusals.append(Refusal(path, options))
            return
        settings.check_order(options)
        self.context.progress(path)
        try:
            detail = self._store(node, path, options)
        except CalibrationError as error:
            raise CalibrationError(f"gptq of {path}: {error}") from error
        if not settings.true_sequential:
            self.lockstep.compute(node)
        rounded = self._replace(node)
        detail = ", ".join([options.describe() + detail, *rounded])
        self.sites.append(Site(module_path(node), detail, node.name))

    def _replace(self, node: Node) -> list[str]:
        """Let a node read its stored weights, and an input that is rounded where so allocated."""
        settings, build = self.settings, Builder(self.program, node, self.settings.name)
        for index in weight_indices(node):
            weight = self._weight(node, index)
            stored = self.done[str(weight.target)]
            node.update_arg(index, read_weight(build, stored, weight.meta["val"].dtype))
            if settings.bias_correction and kind_of(node) == "linear":
                inputs = self._inputs(node)
                means = inputs.mean, inputs.original_mean
                correct_bias(self.program, build, node, weight, *means)
            self.freed += self.program.weight(str(weight.target)).nbytes
        if self.freed >= _FREED:
            # Codes that stay lie between them, so that the C library would keep the pages.
            release_freed_memory(self.freed)
            self.freed = 0
        choice = allocated(node)
        if choice is None or choice.activations is None or reads_rounded(node):
            return []
        node.update_arg(0, quantize_activation(build, node, choice.activations, self.context))
        return [choice.activations.describe()]

    def rounded(self) -> list[Node]:
        """The linears and mixtures of experts that will be rounded."""
        nodes = (node for node in self.program.graph.nodes if kind_of(node) in _ROUNDED)
        return [node for node in nodes if not isinstance(self._options(node), str)]

    def _options(self, node: Node) -> WeightOptions | str:
        """How weights are stored, or why they are left alone."""
        settings = self.settings
        reason = not_selected(node, settings.include, settings.exclude)
        options = weight_options(node, settings.weights)
        if options is None:
            return reason or "allocate-bits leaves it in floating point"
        return reason or unquantizable(self.program, node, options) or options

    def _weight(self, node: Node, index: int) -> Node:
        weight = weight_node(node, index)
        assert weight is not None  # noqa: S101 - `unquantizable` looked
        return weight

    def _store(self, node: Node, path: str, options: WeightOptions) -> str:
        """Store the rounded weights, unless a tied site did; what the report says of them."""
        names = [str(self._weight(node, index).target) for index in weight_indices(node)]
        if all(name in self.done for name in names):
            return ", tied to one before it" + _BY_TOKENS * (kind_of(node) == "experts")
        if kind_of(node) == "experts":
            return self._store_experts(node, path, names, options)
        (name,) = names
        weight, shared = self.program.weight(name), self.shared.take(name)
        if shared is None:
            inputs = self._inputs(node)
            self._note(path, inputs.tokens, inputs.hessian)
            found = self.rounding.rounded(inputs, weight, options)
        else:
            moments, tokens = shared
            h = factorized(moments, self.settings.damping, self.settings.act_order)
            self._note(path, tokens, h)
            found = self.rounding.by_hessian(h, weight, options)
        codes = encode_by_rows(found.grid, found.values)
        self.done[name] = store_weight(self.program, name, codes, found.grid)
        calls = self.shared.calls[name]
        of = f" of the {calls} linears that read it" if calls > 1 else ""
        return f", output error{of} {found.share:.2f}x of rounding to nearest"

    def _store_experts(
        self, node: Node, path: str, names: Sequence[str], options: WeightOptions
    ) -> str:
        source, chosen = node.args[:2]
        assert isinstance(source, Node)  # noqa: S101 - a mixture reads tensors
        assert isinstance(chosen, Node)  # noqa: S101
        count = len(self.program.weight(names[0]))
        rounding = ExpertRounding(count, self.rounding, options)
        rows, chosen = self._rows(source, node), self.lockstep.rows(chosen)
        for number in range(count):
            expert = expert_of(node, self.lockstep.value_of_weight, number)
            rounding.add(number, expert, sent_to(number, rows, chosen))
        for name, (grid, codes) in zip(names, rounding.encoded(), strict=True):
            self.done[name] = store_weight(self.program, name, codes, grid)
        self.notes += rounding.notes(path)
        kept = ", biases as they were" * self.settings.bias_correction
        return f" of each expert, {rounding.detail()}{kept}"

    def _inputs(self, node: Node) -> SeenInputs:
        source = node.args[0]
        assert isinstance(source, Node)  # noqa: S101 - a linear reads a tensor
        if self.latest is None or self.latest[0] is not source:
            self.latest = source, self.rounding.seen(self._rows(source, node))
        return self.latest[1]

    def _rows(self, source: Node, node: Node) -> Rows:
        """What a node reads, as the model is and in the original."""
        original = None if self.original is None else self.original.rows(node)
        return self.lockstep.rows(source), original

    def _note(self, path: str, tokens: int, h: Hessian) -> None:
        inputs = len(h.order)
        if not tokens:
            self.notes.append(
                f"{path} was given only zeros by the calibration data: its weight is rounded as "
                "if all inputs were alike; data that uses this part of the model would help"
            )
        elif tokens < inputs:
            self.notes.append(
                f"{path} has {inputs} inputs and was shown {tokens} tokens: damping decides the "
                "rest; more calibration data would help"
            )
        if h.damping != self.settings.damping:
            self.notes.append(f"{path} needed damping {h.damping:g} to be positive definite")
