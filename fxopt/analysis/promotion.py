"""A float64 twin of a program, on which a pass can be run and judged without rounding."""

from typing import Any

import torch
from torch.fx.node import map_aggregate

from fxopt.analysis.execution import promote
from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.program import Program


def promote_program(program: Program) -> Program:
    """A copy whose weights, constants, conversions and recorded dtypes are float64.

    What a pass writes into such a copy is exact to 1e-16, so that a wrong edit cannot hide
    behind the rounding of the model's own dtype.
    """
    twin = program.clone()
    mode = fake_mode(program)
    for name, value in twin.weights().items():
        twin.set_weight(name, promote(value))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for node in twin.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                node.meta = {**node.meta, "val": _promote_fake(node.meta.get("val"), mode)}
            elif node.op == "call_function":
                node.args = map_aggregate(node.args, promote)  # type: ignore[assignment]
                node.kwargs = map_aggregate(node.kwargs, promote)  # type: ignore[assignment]
                node.meta = {**node.meta, "val": infer(node, mode)}
    finally:
        torch.set_default_dtype(default)
    twin.graph_module.recompile()
    return twin


def _promote_fake(value: Any, mode: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        with mode:
            return value.double()
    return value
