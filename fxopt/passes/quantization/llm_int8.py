"""LLM.int8(): linears in int8, but for the input columns that hold outliers.

    O = {j : max|x_j| >= threshold},    m_j = 0 for j in O, else 1
    y = linear(Q(x * m), Q(W * m)) + b + linear(x[O], W[:, O])

Shapes: x [..., in], O over all calibration tokens; m [in]; W [out, in]; Q of x has a scale per
    token [..., 1], Q of W a scale per output [out, 1]; W[:, O] stays floating.
Exactness: approximate; exact without rounding. Outliers count in no scale. The factor m rides
    inside the operator that quantizes. Deviations: O is found once, from calibration, so that
    shapes are static and no token depends on others of its batch; outliers count in no scale of
    the weight either.
Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
    NeurIPS 2022, arXiv:2208.07339.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.activations import quantize_activation
from fxopt.passes.quantization.grid import choose_grid, encode_by_rows
from fxopt.passes.quantization.options import ActivationOptions, WeightOptions
from fxopt.passes.quantization.sites import not_selected, unquantizable
from fxopt.passes.quantization.weights import read_weight, store_weight, weight_node
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
_WEIGHTS, _ACTIVATIONS = WeightOptions(), ActivationOptions()


@register("llm-int8")
@dataclass(frozen=True)
class LlmInt8(Pass):
    """Store linears in int8 and keep the columns of outliers in floating point."""

    threshold: float = 6.0
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
        """The reach of every linear's input."""
        return (Calibration("minimum"), Calibration("maximum"))

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Split every linear that the patterns select."""
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for node in program.nodes(aten.linear.default):
            path = module_path(node)
            reason = not_selected(node, self.include, self.exclude)
            reason = reason or unquantizable(program, node, _WEIGHTS) or _split_already(node)
            outliers = None if reason else self._outliers(node, context)
            if outliers is not None and bool(outliers.all()):
                reason = f"all {len(outliers)} inputs are outliers at threshold {self.threshold:g}"
            if reason is not None or outliers is None:
                refusals.append(Refusal(path or node.name, str(reason)))
                continue
            context.progress(path)
            split(program, node, outliers, context)
            count = f"{int(outliers.sum())} of {len(outliers)} columns in floating point"
            sites.append(Site(path, f"int8 per token and channel, {count}", node.name))
        return PassResult(tuple(sites), tuple(refusals))

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
