"""Run a program node by node: in float64, or while watching what flows through it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from fxopt.analysis.by_rows import ByRows
from fxopt.ir.program import Program

Watch = Callable[[Node, Any], None]


class _Watched(Interpreter):
    def __init__(self, program: Program, watch: Watch | None) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # errors speak for themselves
        self.program = program
        self.watch = watch

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.program.weight(target)  # a float64 twin converts what it stores

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if self.watch is not None and n.op != "output":
            self.watch(n, result)
        return result


class _Promoted(_Watched):
    """Every floating tensor, constant and conversion is float64.

    Weights are promoted where they are used and freed at once, so that a model never exists a
    second time in float64; the largest not even one by one.
    """

    def __init__(self, program: Program, watch: Watch | None) -> None:
        super().__init__(program, watch)
        self.by_rows = ByRows()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return Interpreter.get_attr(self, target, args, kwargs)  # as it is stored

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = None if kwargs else self.by_rows.call(target, args)
        if result is not None:
            return result
        args = map_aggregate(args, promote)
        kwargs = map_aggregate(kwargs, promote)
        return super().call_function(target, args, kwargs)


def promote(value: Any) -> Any:
    """A floating tensor or dtype in float64, a complex one in complex128, all else as it is."""
    if isinstance(value, Tensor):
        return value.to(_wide(value.dtype))
    return _wide(value) if isinstance(value, torch.dtype) else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


@torch.no_grad()
def run_float64(
    program: Program, inputs: Sequence[Tensor], watch: Watch | None = None
) -> list[Tensor]:
    """The program's flat outputs, computed in float64 throughout."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return [promote(value) for value in _Promoted(program, watch).run(*inputs)]
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def run(program: Program, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
    """The program's flat outputs in its own dtypes, each node's result shown to `watch`."""
    return list(_Watched(program, watch).run(*inputs))
