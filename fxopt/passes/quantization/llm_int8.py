"""LLM.int8(): linears in int8, but for the input columns that hold outliers.

    O = {j : max|x_j| >= threshold},    m_j = 0 for j in O, else 1
    static    y = linear(Q(x * m), Q(W * m)) + b + linear(x[O], W[:, O])
    dynamic   y = linear(Q(x * m), Q(W)) + b + linear(x * (1 - m), Q(W))

Shapes: x [..., in]; O over all calibration tokens (and all linears that read W), or over the tokens
    of a call; m [in]; W [out, in]; Q of x has a scale per token [..., 1], Q of W a scale per output
    [out, 1]; the static W[:, O] stays floating.
Exactness: approximate; exact without rounding. Outliers count in no scale of a token. `static` is
    a deviation: O is found once, so that shapes are fixed, no token depends on others of its
    batch, the factor m rides inside the operator that quantizes, and outliers count in no scale
    of the weight either. `dynamic` is the method as published, with both products of full width:
    it needs no data, a token's result depends on the others of its call (padding too), and it is
    slower than no outliers at all.
Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
    NeurIPS 2022, arXiv:2208.07339.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import (
    Level,
    Program,
    Refusal,
    Site,
    module_path,
    shape_of,
)
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.activations import quantize_activation
from fxopt.passes.quantization.grid import choose_grid, encode_by_rows
from fxopt.passes.quantization.options import ActivationOptions, WeightOptions
from fxopt.passes.quantization.parts import store_parts
from fxopt.passes.quantization.sites import not_selected, other_weights, unquantizable
from fxopt.passes.quantization.weights import (
    StoredWeight,
    kind_of,
    read_weight,
    store_weight,
    weight_name,
)
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
_WEIGHTS, _ACTIVATIONS = WeightOptions(), ActivationOptions()


@register("llm-int8")
@dataclass(frozen=True)
class LlmInt8(Pass):
    """Store linears in int8 and keep the columns of outliers in floating point."""

    threshold: float = 6.0
    outliers: Literal["static", "dynamic"] = "static"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    after = ("canonicalize",)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise RecipeError(f"threshold {self.threshold} is not a number from 0 on.")

    def needs(self) -> tuple[Calibration, ...]:
        """The reach of every linear's input, where the columns are found once."""
        if self.outliers == "dynamic":
            return ()
        return (Calibration("minimum"), Calibration("maximum"))

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Split every linear that the patterns select."""
        sites: list[Site] = []
        refusals: list[Refusal] = []
        store_parts(program, self.include, self.exclude, self.name)
        chosen: list[Node] = []
        for node in program.nodes(aten.linear.default, torch.ops.fxopt.moe.default):
            reason = self._impossible(program, node)
            if reason is None:
                chosen.append(node)
            else:
                refusals.append(Refusal(module_path(node) or node.name, reason))
        # All are found first: a linear that is split gives its sum under another name.
        outliers = self._outliers(chosen, context) if self.outliers == "static" else {}
        splitting = _Splitting(program, context)
        for node in chosen:
            path = module_path(node)
            columns = outliers.get(weight_name(node))
            if columns is not None and bool(columns.all()):
                reason = f"all inputs are outliers at threshold {self.threshold:g}"
                refusals.append(Refusal(path or node.name, reason))
                continue
            context.progress(path)
            if columns is None:
                splitting.at_run_time(node, self.threshold)
                told = f"columns that reach {self.threshold:g} in a call apart"
            else:
                splitting.by_columns(node, columns)
                told = f"{int(columns.sum())} of {len(columns)} columns in floating point"
            sites.append(Site(path, f"int8 per token and channel, {told}", node.name))
        return PassResult(tuple(sites), tuple(refusals + other_weights(program)), activations={})

    def _impossible(self, program: Program, node: Node) -> str | None:
        reason = not_selected(node, self.include, self.exclude)
        reason = reason or unquantizable(program, node, _WEIGHTS) or _split_already(node)
        if reason is None and kind_of(node) == "experts":
            return "a mixture of experts; llm-int8 splits the columns of linears"
        return reason

    def _outliers(self, linears: Sequence[Node], context: Context) -> dict[str, Tensor]:
        """By weight, bool [in]: which inputs reach the threshold in any linear that reads it."""
        found: dict[str, Tensor] = {}
        for node in linears:
            reach = self._reach(node, context)
            known = found.get(weight_name(node))
            outlying = reach >= self.threshold
            found[weight_name(node)] = outlying if known is None else known | outlying
        return found

    def _reach(self, node: Node, context: Context) -> Tensor:
        """The largest |x| of each input, [in]."""
        source: Any = node.args[0]
        if source.name not in context.statistics["minimum"]:
            raise CalibrationError(
                f"the input of {module_path(node) or node.name} was never reached by the "
                "calibration data. Pass calibration data that uses this part of the model."
            )
        low, high = (context.statistics[name][source.name] for name in ("minimum", "maximum"))
        return torch.maximum(-low, high)


_MARK = "outlier_columns"


def _split_already(node: Node) -> str | None:
    """Whether a linear is the floating part of one that was split."""
    weight: Any = node.args[1]
    held = _MARK in str(weight.target)
    return "its columns are the outliers of a linear that was split" if held else None


def _beside(name: str, other: str) -> str:
    """A name in the module of a weight; at the root of the model it has no dot."""
    return f"{name.rpartition('.')[0]}.{other}".lstrip(".")


class _Splitting:
    """Replaces linears by an int8 part and a floating one; what they share is held once."""

    def __init__(self, program: Program, context: Context) -> None:
        self.program = program
        self.context = context
        self.stored: dict[str, StoredWeight] = {}
        self.parts: dict[Node, tuple[Node, Node]] = {}  # of activations: inliers and outliers

    def by_columns(self, node: Node, outliers: Tensor) -> None:
        """Split a linear where its outlier columns [in] are known."""
        source: Any = node.args[0]
        name, build = weight_name(node), Builder(self.program, node, "llm-int8")
        weight = self.program.weight(name)
        some = bool(outliers.any())
        if some:
            mask = build.equal_weight(_beside(name, "inlier_mask"), (~outliers).to(weight.dtype))
            node.update_arg(0, build.call(aten.mul.Tensor, source, mask))
        node.update_arg(0, quantize_activation(build, node, _ACTIVATIONS, self.context))
        node.update_arg(1, self._read(build, name, torch.where(outliers, 0, weight)))
        if some:
            self._add_outliers(node, source, name, weight[:, outliers], outliers)

    def at_run_time(self, node: Node, threshold: float) -> None:
        """Replace a linear by two over one int8 weight, for inliers rounded and for outliers."""
        source: Any = node.args[0]
        name, build = weight_name(node), Builder(self.program, node, "llm-int8")
        if source not in self.parts:
            axes = list(range(len(shape_of(source)) - 1))
            reach = build.call(aten.amax.default, build.call(aten.abs.default, source), axes)
            outlying = build.call(aten.ge.Scalar, reach, threshold)
            inner = build.call(aten.where.ScalarSelf, outlying, 0, source)
            outer = build.call(aten.where.ScalarOther, outlying, source, 0)
            self.parts[source] = inner, outer
        inner, outer = self.parts[source]
        values = self._read(build, name, self.program.weight(name))
        node.update_arg(0, inner)
        node.update_arg(0, quantize_activation(build, node, _ACTIVATIONS, self.context))
        node.update_arg(1, values)
        users = list(node.users)
        after = Builder(self.program, node.next, "llm-int8")
        floating = after.call(aten.linear.default, outer, values)
        total = after.call(aten.add.Tensor, node, floating)
        for user in users:
            user.replace_input_with(node, total)

    def _read(self, build: Builder, name: str, values: Tensor) -> Node:
        """Store the int8 part of a weight, unless another linear did; the node that gives it."""
        if name not in self.stored:
            grid = choose_grid(values, _WEIGHTS)
            codes = encode_by_rows(grid, values)
            self.stored[name] = store_weight(self.program, name, codes, grid)
        return read_weight(build, self.stored[name], values.dtype)

    def _add_outliers(
        self, node: Node, source: Node, name: str, weight: Tensor, outliers: Tensor
    ) -> None:
        """Add to a linear what the outlier columns [out, |O|] contribute."""
        users = list(node.users)
        build = Builder(self.program, node.next, "llm-int8")
        columns = build.equal_weight(_beside(name, "outliers"), outliers.nonzero().flatten())
        gathered = build.call(aten.index_select.default, source, -1, columns)
        held = build.equal_weight(_beside(name, _MARK), weight.contiguous())
        floating = build.call(aten.linear.default, gathered, held)
        total = build.call(aten.add.Tensor, node, floating)
        for made in build.created:
            made.meta["module_path"] = module_path(node)
        for user in users:
            user.replace_input_with(node, total)
