"""Quantize linears and embeddings: integer weights, and activations dynamic or static.

    q = clamp(round(x / s) + z, q_min, q_max),    x ~ s (q - z)
    y = linear(dequantize(quantize(x)), dequantize(w_q)) + b

Shapes: linear weight [out, in], one scale per tensor, out-channel [out, 1] or group of g inputs
    [out, in/g]; activation [..., in], one scale per token [..., 1] or per tensor; embedding
    table [rows, d], one scale per row.
Exactness: approximate; half a step of each scale per element.
Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale,
    NeurIPS 2022, arXiv:2208.07339 (vector-wise scales); Nagel et al., A White Paper on Neural
    Network Quantization, 2021, arXiv:2106.08295 (ranges, static activations).
"""

import fnmatch
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, Refusal, Site, dtype_of, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.sites import (
    QuantizedWeight,
    quantize_activation,
    quantize_weight,
    unquantizable,
    weight_paths,
)
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightOptions:
    """How weights of linears are stored."""

    dtype: Literal["int8", "int4"] = "int8"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            raise RecipeError("granularity 'group' needs group_size, a positive number.")
        if self.granularity != "group" and self.group_size is not None:
            raise RecipeError(
                f"group_size {self.group_size} has no meaning at granularity "
                f"{self.granularity!r}; set granularity to 'group' or leave group_size out."
            )


@dataclass(frozen=True)
class ActivationOptions:
    """How inputs of linears are rounded: "token" at run time, "tensor" from calibration."""

    dtype: Literal["int8", "int4"] = "int8"
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True


@dataclass(frozen=True)
class EmbeddingOptions:
    """How embedding tables are stored: one scale per row, or one for the table."""

    dtype: Literal["int8"] = "int8"
    granularity: Literal["tensor", "channel"] = "channel"


@register("quantize")
@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights as integers and round activations, by the granularity the recipe asks for."""

    weights: WeightOptions = field(default_factory=WeightOptions)
    activations: ActivationOptions | None = None
    embeddings: EmbeddingOptions | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    after = ("canonicalize",)

    def needs(self) -> tuple[Calibration, ...]:
        """Static activations need the range of every linear's input."""
        static = self.activations is not None and self.activations.granularity == "tensor"
        return (Calibration("minimum"), Calibration("maximum")) if static else ()

    def observed(self, program: Program) -> list[Node]:
        """The activations whose ranges `run` reads."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every site the patterns select."""
        sites: list[Site] = []
        refusals: list[Refusal] = []
        done: dict[tuple[Any, ...], QuantizedWeight] = {}
        for node in program.nodes():
            kind = self._kind(node)
            path = module_path(node)
            if kind is None:
                continue
            reason = self._selected(node, path) or unquantizable(program, node, self.weights, kind)
            if reason is not None:
                refusals.append(Refusal(path or node.name, reason))
                continue
            context.progress(path)
            detail = self._rewrite(program, node, kind, context, done)
            sites.append(Site(path, detail, node.name))
        refusals += _other_weights(program)
        return PassResult(tuple(sites), tuple(refusals))

    def _kind(self, node: Node) -> Literal["linear", "embedding"] | None:
        if node.target is aten.linear.default:
            return "linear"
        is_table = node.target is aten.embedding.default and self.embeddings is not None
        return "embedding" if is_table else None

    def _selected(self, node: Node, path: str) -> str | None:
        names = [path, *weight_paths(node)]
        if not any(fnmatch.fnmatchcase(n, p) for n in names for p in self.include):
            return f"not selected by include {list(self.include)}"
        excluded = [p for p in self.exclude if any(fnmatch.fnmatchcase(n, p) for n in names)]
        return f"excluded by {excluded[0]!r}" if excluded else None

    def _rewrite(
        self,
        program: Program,
        node: Node,
        kind: Literal["linear", "embedding"],
        context: Context,
        done: dict[tuple[Any, ...], QuantizedWeight],
    ) -> str:
        build = Builder(program, node, self.name)
        if kind == "embedding":
            assert self.embeddings is not None  # noqa: S101 - _kind saw it
            options = WeightOptions(self.embeddings.dtype, self.embeddings.granularity)
            weight = quantize_weight(program, build, node, 0, options, done)
            node.update_arg(0, weight)
            return f"{options.dtype} table per {_unit(options.granularity, 'row')}"
        weight = quantize_weight(program, build, node, 1, self.weights, done)
        node.update_arg(1, weight)
        detail = f"{self.weights.dtype} weight per {_unit(self.weights.granularity, 'channel')}"
        if self.activations is not None:
            node.update_arg(0, quantize_activation(build, node, self.activations, context))
            detail += f", {self.activations.dtype} activation per {self.activations.granularity}"
        return detail


def _unit(granularity: str, channel: str) -> str:
    return channel if granularity == "channel" else granularity


def _other_weights(program: Program) -> list[Refusal]:
    """Large weights that this pass has no rule for, so that the report shows what stayed."""
    refusals: list[Refusal] = []
    for node in program.graph.nodes:
        dtype = dtype_of(node)
        if node.op != "get_attr" or not node.users or dtype is None or not dtype.is_floating_point:
            continue
        value = program.weight(str(node.target))
        users = {str(user.target) for user in node.users}
        plain = {"aten.linear.default", "aten.embedding.default", "fxopt.dequantize.default"}
        if value.dim() >= 2 and value.numel() >= 4096 and not users & plain:
            reason = f"a weight of shape {list(value.shape)} read by {', '.join(sorted(users))}"
            refusals.append(Refusal(str(node.target), reason + " has no quantized form yet"))
    return refusals
