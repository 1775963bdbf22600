"""Products of groups of rows, by the operator that takes every dtype.

    y[s_e : s_{e+1}] = x[s_e : s_{e+1}] W_e

Shapes: x [rows, in], sorted by group; W [groups, in, out]; offs [groups] are the ends s_{e+1}.
    In bfloat16 a model's experts are exported with aten._grouped_mm, which takes no float64, in
    which programs are judged; in other dtypes with an operator of transformers that computes the
    same.
"""

import importlib

import torch
from torch.fx import Graph

from fxopt.ir.program import shape_of

_GROUPED = torch.ops.aten._grouped_mm.default


def take_any_dtype(graph: Graph) -> None:
    """Let products of groups of rows run in every dtype."""
    for node in graph.find_nodes(op="call_function", target=_GROUPED):
        names = ("self", "mat2", "offs", "bias", "out_dtype")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, weights, ends = (given.get(name) for name in names[:3])
        plain = given.get("bias") is None and given.get("out_dtype") is None
        if not plain or ends is None or [len(shape_of(n)) for n in (x, weights)] != [2, 3]:
            continue
        importlib.import_module("transformers.integrations.moe")  # registers it
        node.target = torch.ops.transformers.grouped_mm_fallback.default
        node.args, node.kwargs = (x, weights, ends), {}
