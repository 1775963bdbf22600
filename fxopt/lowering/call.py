"""One call of a program as it will run, for who wants to time it."""

from collections.abc import Callable
from typing import Any

import torch

from fxopt.errors import LoweringError
from fxopt.ir.program import Program
from fxopt.ir.runner import Runner
from fxopt.lowering.gate import example_value
from fxopt.lowering.lower import LoweringOptions, lower


def lowered_call(
    program: Program, options: LoweringOptions, shape: tuple[int, int]
) -> Callable[[], Any]:
    """A call at (batch, length), with an empty cache where there is one; it has run once.

    Raises:
        LoweringError: the program does not run at that shape.
    """
    lowered = lower(program, options).program
    runner = Runner(lowered.graph_module)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    inputs = [example_value(node, lowered, shape) for node in placeholders]

    @torch.no_grad()
    def call() -> Any:
        result = runner.forward(*inputs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    try:
        call()
    except (RuntimeError, IndexError) as error:
        raise LoweringError(
            f"the model does not run at batch {shape[0]}, length {shape[1]}: {error}. Choose "
            "another shape for the budget."
        ) from error
    return call
