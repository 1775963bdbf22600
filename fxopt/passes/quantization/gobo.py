"""GOBO: weights from a small learned table, the few that no table fits kept as they are.

    W ~ put(table[codes], positions, values),  positions = {i : log N(W_i; mu, sigma^2) < threshold}

Shapes: W [out, in] of a linear or [rows, d] of an embedding; codes packed [out, ceil(in bits / 8)]
    uint8; table [1, 1, 2^bits] and values [outliers] in W's dtype; positions [outliers] int64, as
    `aten.put` takes them: an outlier costs 12 bytes in float32.
Exactness: approximate; outliers to the bit, the others one of 2^bits values (see codebook). No
    data is needed and activations stay as they are. Linears run from four-bit codes where that is
    faster; embeddings are stored as codes and run from their values.
Source: Zadeh et al., GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy
    Efficient Inference, MICRO 2020, arXiv:2005.03842.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.number_formats import codebook_format
from fxopt.ir.program import Level, Program, Refusal, Site, module_path
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.codebook import learn_codebook, outlier_mask
from fxopt.passes.quantization.parts import store_parts
from fxopt.passes.quantization.sites import not_selected, other_weights, unquantizable
from fxopt.passes.quantization.weights import kind_of, weight_indices, weight_node
from fxopt.rewrite.builder import Builder, free_name

aten = torch.ops.aten
ops = torch.ops.fxopt


@dataclass(frozen=True)
class _Stored:
    """The name under which the parts of a weight are held, and what the report says of it."""

    name: str
    columns: int
    outliers: int
    detail: str


@register("gobo")
@dataclass(frozen=True)
class Gobo(Pass):
    """Store weights as codes into a table learned for each, and outliers as they are."""

    bits: Literal[2, 3, 4] = 3
    threshold: float = -4.0
    embeddings: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    after = ("canonicalize",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Store every selected weight; a tied one once."""
        sites: list[Site] = []
        refusals: list[Refusal] = []
        done: dict[str, _Stored | str] = {}
        store_parts(program, self.include, self.exclude, self.name)
        for node in program.nodes():
            if kind_of(node) is None:
                continue
            path = module_path(node)
            found = self._impossible(program, node)
            if found is None:
                context.progress(path)
                weight = weight_node(node, *weight_indices(node))
                assert weight is not None  # noqa: S101 - `unquantizable` looked
                name = str(weight.target)
                found = done[name] = done.get(name) or self._store(program, name)
            if isinstance(found, str):
                refusals.append(Refusal(path or node.name, found))
                continue
            read = self._read(Builder(program, node, self.name), found)
            (index,) = weight_indices(node)
            node.update_arg(index, read)
            sites.append(Site(path, found.detail, node.name))
        return PassResult(tuple(sites), tuple(refusals + other_weights(program)), activations={})

    def _impossible(self, program: Program, node: Node) -> str | None:
        reason = not_selected(node, self.include, self.exclude) or unquantizable(program, node)
        if reason is None and kind_of(node) == "experts":
            return "a mixture of experts; gobo learns tables for linears and embeddings"
        if reason is None and kind_of(node) == "embedding" and not self.embeddings:
            return "an embedding; embeddings: true takes it"
        return reason

    def _store(self, program: Program, name: str) -> _Stored | str:
        """Hold the parts of a weight, or say why they are not worth it."""
        weight = program.weight(name)
        if not bool(torch.isfinite(weight).all()):
            return "the weight holds NaN or infinity"
        outliers = outlier_mask(weight, self.threshold)
        positions = outliers.flatten().nonzero().flatten()
        if weight.numel() == 0 or len(positions) == weight.numel():
            return f"all {weight.numel()} weights are outliers at threshold {self.threshold:g}"
        table = learn_codebook(weight[~outliers], self.bits)
        parts: dict[str, Tensor] = {
            "": ops.pack(table.encode(weight, weight.dtype), self.bits),
            "_table": table.table.to(weight.dtype).reshape(1, 1, -1),
        }
        if len(positions):
            values = weight.flatten()[positions]
            parts |= {"_outlier_positions": positions, "_outlier_values": values}
        stored, plain = (sum(t.nbytes for t in held) for held in (parts.values(), [weight]))
        if stored >= plain:
            return f"codes and {len(positions)} outliers take {stored} bytes, the weight {plain}"
        base = free_name(program, f"{name}_{codebook_format(self.bits).name}")
        for part, value in parts.items():
            program.set_weight(base + part, value)
        share = len(positions) / weight.numel()
        detail = f"{self.bits}-bit codes, {len(positions)} outliers ({share:.2%}), {stored} bytes"
        return _Stored(base, weight.shape[1], len(positions), detail)

    def _read(self, build: Builder, stored: _Stored) -> Node:
        codes, table = build.read(stored.name), build.read(f"{stored.name}_table")
        codes = build.call(ops.unpack.default, codes, self.bits, stored.columns, False)
        plain = build.call(ops.lookup.default, codes, table, [-1, -1])
        if not stored.outliers:
            return plain
        parts = (build.read(f"{stored.name}_outlier_{part}") for part in ("positions", "values"))
        return build.call(aten.put.default, plain, *parts, False)
