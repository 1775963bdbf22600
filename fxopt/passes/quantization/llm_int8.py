"""LLM.int8(): linears in int8, but for the input columns that hold outliers.

    O = {j : max|x_j| >= threshold},    m_j = 0 for j in O, else 1
    static    y = linear(Q(x * m), Q(W * m)) + b + linear(x[O], W[:, O])
    dynamic   y = linear(Q(x * m), Q(W)) + b + linear(x * (1 - m), Q(W))

Shapes: x [..., in]; O over all calibration tokens, or over the tokens of a call; m [in]; W [out,
    in]; Q of x has a scale per token [..., 1], Q of W a scale per output [out, 1]; the static
    W[:, O] stays floating.
Exactness: approximate; exact without rounding. Outliers count in no scale of a token. `static` is
    a deviation: O is found once, so that shapes are fixed, no token depends on others of its
    batch, the factor m rides inside the operator that quantizes, and outliers count in no scale
    of the weight either. `dynamic` is the method as published, with both products of full width:
    it needs no data, a token's result depends on the others of its call (padding too), and it is
    slower than no outliers at all.
Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
    NeurIPS 2022, arXiv:2208.07339.
"""

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
from fxopt.passes.quantization.sites import not_selected, unquantizable
from fxopt.passes.quantization.weights import kind_of, read_weight, store_weight, weight_node
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
        parts: dict[Node, tuple[Node, Node]] = {}
        store_parts(program, self.include, self.exclude, self.name)
        for node in program.nodes(aten.linear.default, torch.ops.fxopt.moe.default):
            path = module_path(node)
            reason = not_selected(node, self.include, self.exclude)
            reason = reason or unquantizable(program, node, _WEIGHTS) or _split_already(node)
            if reason is None and kind_of(node) == "experts":
                reason = "a mixture of experts; llm-int8 splits the columns of linears"
            detail = reason or self._split(program, node, parts, context)
            if reason is not None or detail is None:
                width = f"all inputs are outliers at threshold {self.threshold:g}"
                refusals.append(Refusal(path or node.name, reason or width))
                continue
            context.progress(path)
            sites.append(Site(path, f"int8 per token and channel, {detail}", node.name))
        return PassResult(tuple(sites), tuple(refusals), activations={})

    def _split(
        self,
        program: Program,
        node: Node,
        parts: dict[Node, tuple[Node, Node]],
        context: Context,
    ) -> str | None:
        """Rewrite a linear; what the report says of it, or None where nothing would be int8."""
        if self.outliers == "dynamic":
            split_at_run_time(program, node, self.threshold, parts, context)
            return f"columns that reach {self.threshold:g} in a call apart"
        outliers = self._outliers(node, context)
        if bool(outliers.all()):
            return None
        split(program, node, outliers, context)
        return f"{int(outliers.sum())} of {len(outliers)} columns in floating point"

    def _outliers(self, node: Node, context: Context) -> Tensor:
        """Which inputs reach the threshold, bool [in]."""
        source: Any = node.args[0]
        if source.name not in context.statistics["minimum"]:
            raise CalibrationError(
                f"the input of {module_path(node) or node.name} was never reached by the "
                "calibration data. Pass calibration data that uses this part of the model."
            )
        low, high = (context.statistics[name][source.name] for name in ("minimum", "maximum"))
        return torch.maximum(-low, high) >= self.threshold


_MARK = ".outlier_columns"


def _split_already(node: Node) -> str | None:
    """Whether a linear is the floating part of one that was split."""
    weight: Any = node.args[1]
    held = _MARK in str(weight.target)
    return "its columns are the outliers of a linear that was split" if held else None


def split(program: Program, node: Node, outliers: Tensor, context: Context) -> None:
    """Replace a linear by its int8 part and the floating part of the outlier columns."""
    source: Any = node.args[0]
    weight_source = weight_node(node, 1)
    assert weight_source is not None  # noqa: S101 - `unquantizable` looked
    name = str(weight_source.target)
    weight, path = program.weight(name), module_path(node) or node.name
    inner = torch.where(outliers, 0, weight)
    grid = choose_grid(inner, _WEIGHTS)
    build = Builder(program, node, "llm-int8")
    if bool(outliers.any()):
        mask = build.new_weight(f"{path}.inlier_mask", (~outliers).to(weight.dtype))
        node.update_arg(0, build.call(aten.mul.Tensor, source, mask))
    node.update_arg(0, quantize_activation(build, node, _ACTIVATIONS, context))
    stored = store_weight(program, name, encode_by_rows(grid, inner), grid)
    node.update_arg(1, read_weight(build, stored, weight.dtype))
    if bool(outliers.any()):
        _add_outliers(program, node, source, weight[:, outliers], outliers)


def split_at_run_time(
    program: Program,
    node: Node,
    threshold: float,
    parts: dict[Node, tuple[Node, Node]],
    context: Context,
) -> None:
    """Replace a linear by two over the same int8 weight, for inliers rounded and for outliers.

    `parts` holds both parts of each activation, which linears share.
    """
    source: Any = node.args[0]
    weight_source = weight_node(node, 1)
    assert weight_source is not None  # noqa: S101 - `unquantizable` looked
    name, build = str(weight_source.target), Builder(program, node, "llm-int8")
    if source not in parts:
        axes = list(range(len(shape_of(source)) - 1))
        reach = build.call(aten.amax.default, build.call(aten.abs.default, source), axes)
        outlying = build.call(aten.ge.Scalar, reach, threshold)
        inner = build.call(aten.where.ScalarSelf, outlying, 0, source)
        parts[source] = inner, build.call(aten.where.ScalarOther, outlying, source, 0)
    inner, outer = parts[source]
    weight = program.weight(name)
    grid = choose_grid(weight, _WEIGHTS)
    stored = store_weight(program, name, encode_by_rows(grid, weight), grid)
    values = read_weight(build, stored, weight.dtype)
    node.update_arg(0, inner)
    node.update_arg(0, quantize_activation(build, node, _ACTIVATIONS, context))
    node.update_arg(1, values)
    users = list(node.users)
    after = Builder(program, node.next, "llm-int8")
    total = after.call(aten.add.Tensor, node, after.call(aten.linear.default, outer, values))
    for user in users:
        user.replace_input_with(node, total)


def _add_outliers(
    program: Program, node: Node, source: Node, weight: Tensor, outliers: Tensor
) -> None:
    """Add to a linear what the outlier columns [out, |O|] contribute."""
    users = list(node.users)
    build = Builder(program, node.next, "llm-int8")
    path = module_path(node) or node.name
    columns = build.new_weight(f"{path}.outliers", outliers.nonzero().flatten())
    gathered = build.call(aten.index_select.default, source, -1, columns)
    held = build.new_weight(f"{path}{_MARK}", weight.contiguous())
    floating = build.call(aten.linear.default, gathered, held)
    total = build.call(aten.add.Tensor, node, floating)
    for made in build.created:
        made.meta["module_path"] = module_path(node)
    for user in users:
        user.replace_input_with(node, total)
