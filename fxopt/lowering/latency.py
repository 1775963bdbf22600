"""How long a call of a program takes once it is lowered."""

import time

import torch

from fxopt.errors import LoweringError
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Program
from fxopt.ir.runner import Runner
from fxopt.lowering.gate import example_value
from fxopt.lowering.lower import LoweringOptions, lower

_FEWEST_CALLS = 5
_ENOUGH_SECONDS = 0.5


def milliseconds(program: Program, options: LoweringOptions, shape: tuple[int, int]) -> float:
    """The fastest of many calls at (batch, length), with an empty cache where there is one.

    Raises:
        LoweringError: the program does not run at that shape.
    """
    lowered = lower(program, options).program
    runner = Runner(lowered.graph_module)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    inputs = [example_value(node, lowered, shape) for node in placeholders]
    best = float("inf")
    try:
        with torch.no_grad():
            runner.forward(*inputs)
            started, calls = time.perf_counter(), 0
            while calls < _FEWEST_CALLS or time.perf_counter() - started < _ENOUGH_SECONDS:
                calls += 1
                begun = time.perf_counter()
                runner.forward(*inputs)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - begun)
    except (RuntimeError, IndexError) as error:
        raise LoweringError(
            f"the model does not run at batch {shape[0]}, length {shape[1]}: {error}. Choose "
            "another shape for the budget."
        ) from error
    lowered.release()
    release_freed_memory(program.byte_count())
    return best * 1e3
