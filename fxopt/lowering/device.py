"""Move a program to another device: its weights, and the devices its graph names."""

from typing import Any

import torch
from torch.fx.node import map_aggregate

from fxopt.ir.program import Program


def move_program(program: Program, device: torch.device) -> Program:
    """A copy of the program whose weights and constants are on `device`."""
    moved = program.clone()
    for name, value in moved.weights().items():
        moved.set_weight(name, value.to(device))

    def redirect(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in moved.graph.nodes:
        if node.op == "call_function":
            node.args = map_aggregate(node.args, redirect)  # type: ignore[assignment]
            node.kwargs = map_aggregate(node.kwargs, redirect)  # type: ignore[assignment]
    moved.graph_module.recompile()
    return moved
