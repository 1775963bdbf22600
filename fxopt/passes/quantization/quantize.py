"""Quantize linears and embeddings: integer weights, and activations dynamic or static.

    q = clamp(round(x / s) + z, q_min, q_max),    x ~ s (q - z)
    y = linear(dequantize(quantize(x)), dequantize(w_q)) + b

Shapes: linear weight [out, in], one scale per tensor, out-channel [out, 1], group of g inputs
    [out, in / g] or block of outputs and inputs, of which [g, -1] is a group of g output rows;
    experts [E, out, in] one by one;
    activation [..., in], one scale per token [..., 1], per tensor or per group of embedding
    dimensions [K]; embedding table [rows, d], one scale per row or group of a row. Codes of less
    than 8 bits are packed. Without `weights`, activations of linears alone are rounded.
    Granularity "head" divides the rows of each head of Wq, Wk and Wv, and its columns of Wo, into
    `groups_per_head` groups, and the rows of other weights into groups as large.
Exactness: approximate; half a step of each scale per element. With `bias_correction` the mean of
    each output over the calibration data is that of exact weights, for inputs as they were before
    the pass.
Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
    NeurIPS 2022, arXiv:2208.07339 (vector-wise scales); Nagel et al., A White Paper on Neural
    Network Quantization, 2021, arXiv:2106.08295 (ranges, static activations); Nagel et al.,
    Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
    arXiv:1906.04721 (`bias_correction`); Yao et al., ZeroQuant, NeurIPS 2022, arXiv:2206.01861
    (groups of rows); Shen et al., Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT,
    AAAI 2020, arXiv:1909.05840 (groups per head).
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, module_path
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.activations import (
    quantize_activation,
    reads_rounded,
    width_of,
)
from fxopt.passes.quantization.bias_correction import correct_bias
from fxopt.passes.quantization.options import (
    ActivationOptions,
    Choice,
    EmbeddingOptions,
    WeightOptions,
)
from fxopt.passes.quantization.parts import store_parts
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
    quantize_weight,
    weight_indices,
    weight_node,
)
from fxopt.rewrite.builder import Builder

# Tokens by which `range: output` judges.
ROWS = 512


@register("quantize")
@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights as integers and round activations, by the granularity the recipe asks for."""

    weights: WeightOptions | None = field(default_factory=WeightOptions)
    activations: ActivationOptions | None = None
    embeddings: EmbeddingOptions | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    bias_correction: bool = False

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    after = ("canonicalize",)

    def __post_init__(self) -> None:
        if self.weights is None and self.activations is None and self.embeddings is None:
            raise RecipeError(
                "quantize has nothing to do: weights, activations and embeddings are null."
            )
        if self.bias_correction and self.weights is None:
            raise RecipeError(
                "bias_correction makes up for rounded weights of linears and weights is null; set "
                "weights or leave bias_correction out."
            )

    def needs(self) -> tuple[Calibration, ...]:
        """Ranges for static activations, rows for `range: output`, means for biases."""
        known = () if self.activations is None else self.activations.statistics
        ranges = tuple(Calibration(statistic) for statistic in known)
        rows = (Calibration("rows", ROWS),) if self._judges_output() else ()
        return (*ranges, *rows, *((Calibration("mean"),) if self.bias_correction else ()))

    def _judges_output(self) -> bool:
        return self.weights is not None and self.weights.range == "output"

    def observed(self, program: Program) -> list[Node]:
        """The activations whose ranges `run` reads."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every site the patterns select."""
        sites: list[Site] = []
        refusals: list[Refusal] = []
        done: dict[tuple[Any, ...], StoredWeight] = {}
        if self.weights is not None:
            store_parts(program, self.include, self.exclude, self.name)
        mark_heads(program, self.weights)
        for node in program.nodes():
            kind = kind_of(node)
            if kind is None or not self._asks_for(node):
                continue
            path = module_path(node)
            reason = not_selected(node, self.include, self.exclude) or self._impossible(
                program, node
            )
            if reason is not None:
                refusals.append(Refusal(path or node.name, reason))
                continue
            context.progress(path)
            build = Builder(program, node, self.name)
            details = [
                *self._weight(program, build, node, done, context),
                *self._activation(build, node, context),
            ]
            sites.append(Site(path, ", ".join(details), node.name))
        return PassResult(
            tuple(sites),
            tuple(refusals + other_weights(program)),
            _sorted_otherwise(program, self.activations),
            activations={},
        )

    def _asks_for(self, node: Node) -> bool:
        """Whether the recipe, or `allocate-bits` before it, says anything of such a node."""
        if kind_of(node) == "embedding":
            return self.embeddings is not None
        if kind_of(node) == "experts":
            return True  # what stays is said in any case
        chosen = (self.weights, self.activations, allocated(node))
        return any(option is not None for option in chosen)

    def _weight_options(self, node: Node) -> WeightOptions | None:
        if kind_of(node) != "embedding":
            return weight_options(node, self.weights)
        return None if self.embeddings is None else self.embeddings.as_weight()

    def _activation_options(self, node: Node) -> ActivationOptions | None:
        if kind_of(node) != "linear":
            return None
        choice = allocated(node)
        return self.activations if choice is None else choice.activations

    def _impossible(self, program: Program, node: Node) -> str | None:
        options, activations = self._weight_options(node), self._activation_options(node)
        if options is None and activations is None:
            choice = allocated(node)
            if choice is not None:
                return _left_by(choice, is_stored_weight(node.args[1]))
            return "weights are null, and activations of experts are not rounded"
        misfit = None if activations is None else activations.misfit(width_of(node))
        if options is not None:
            return unquantizable(program, node, options) or misfit
        if misfit is not None:
            return misfit
        if not is_stored_weight(node.args[1]) and weight_node(node, 1) is None:
            return "the weight is computed in the graph, not stored"
        return "its input is already rounded" if reads_rounded(node) else None

    def _weight(
        self,
        program: Program,
        build: Builder,
        node: Node,
        done: dict[tuple[Any, ...], StoredWeight],
        context: Context,
    ) -> list[str]:
        options = self._weight_options(node)
        if options is None:
            return _left_behind(node)
        kind, indices = kind_of(node), weight_indices(node)
        exact = weight_node(node, indices[0])
        judged = kind == "linear" and self._judges_output()
        rows = _observed("rows", node, context) if judged else None
        for index in indices:
            weight = quantize_weight(program, build, node, index, options, done, rows)
            node.update_arg(index, weight)
        if kind == "embedding":
            return [options.describe("row").replace(" weight ", " table ")]
        if kind == "experts":
            return self._of_experts(options)
        details = [options.describe()]
        if self.bias_correction and exact is not None:
            mean = _observed("mean", node, context)
            details += ["bias corrected"] * correct_bias(program, build, node, exact, mean)
        return details

    def _of_experts(self, options: WeightOptions) -> list[str]:
        """What the report says of experts, whose inputs calibration does not tell apart."""
        details = [f"{options.describe()} of each expert"]
        if self._judges_output():
            details.append("ranges of the least error of the weight")
        if self.activations is not None:
            details.append("activations in floating point")
        return details + ["biases as they were"] * self.bias_correction

    def _activation(self, build: Builder, node: Node, context: Context) -> list[str]:
        options = self._activation_options(node)
        if options is None:
            return []
        node.update_arg(0, quantize_activation(build, node, options, context))
        return [options.describe()]


def _left_by(choice: Choice, stored: bool) -> str:
    """Why a pass leaves a linear alone for which `allocate-bits` chose no activations."""
    if choice.weights is None:
        return "allocate-bits leaves it in floating point"
    if stored:
        return "allocate-bits leaves its activations in floating point"
    return f"allocate-bits chose {choice.describe()}, and weights are null here"


def _left_behind(node: Node) -> list[str]:
    """What to say of a weight for which bits are allocated and that this pass does not store."""
    choice = allocated(node)
    if choice is None or choice.weights is None or is_stored_weight(node.args[1]):
        return []
    return [f"{choice.weights.describe()} left to a pass behind"]


def _sorted_otherwise(program: Program, options: ActivationOptions | None) -> tuple[str, ...]:
    """What to say where `peg` sorted channels for other groups than are rounded now."""
    sorts = [record.options for record in program.history if record.name == "peg"]
    if options is None or options.granularity != "embedding_group" or not sorts:
        return ()
    mine = {"groups": options.groups, "symmetric": options.symmetric}
    return tuple(
        f"peg sorted channels for {name}: {sorts[-1][name]} and activations are rounded with "
        f"{name}: {asked}: the groups are not the best; give both passes the same"
        for name, asked in mine.items()
        if sorts[-1][name] != asked
    )


def _observed(statistic: str, node: Node, context: Context) -> Tensor:
    """What calibration found at the input of a linear."""
    source: Any = node.args[0]
    if source.name not in context.statistics[statistic]:
        raise CalibrationError(
            f"the input of {module_path(node) or node.name} was never reached by the "
            "calibration data. Pass calibration data that uses this part of the model."
        )
    return context.statistics[statistic][source.name]
