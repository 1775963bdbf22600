"""Capture small modules and run their graphs in float64."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.fx.node import map_aggregate

from fxopt.capture.export import export_flat
from fxopt.ir.program import Program
from fxopt.ir.signature import Signature, TensorSpec


class Function(nn.Module):
    """A plain function of tensors as a module; parameters by keyword."""

    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = list(parameters)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, *(getattr(self, name) for name in self.names))


def capture_module(
    module: nn.Module, *tensors: Tensor, dynamic: dict[int, list[int]] | None = None
) -> Program:
    """A module as a Program; `dynamic` maps an input's index to the axes that may vary.

    The axes 0 and 1 of the first input vary by default, where it has more than two.
    """
    names = [f"input_{index}" for index in range(len(tensors))]
    if dynamic is None:
        dynamic = {0: [0, 1] if tensors[0].dim() > 2 else []}
    axes = {name: dynamic.get(index, []) for index, name in enumerate(names)}

    def forward(*args: Tensor) -> list[Tensor]:
        result = type(module).forward(module, *args)
        return [result] if isinstance(result, Tensor) else list(result)

    graph_module, aliases, _ = export_flat(
        module, forward, dict(zip(names, tensors, strict=True)), axes
    )
    signature = Signature(
        inputs=tuple(
            TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in zip(names, tensors, strict=True)
        ),
        outputs=(),
        input_structure={},
        output_structure={},
    )
    return Program(graph_module, signature, aliases=aliases)


class _InFloat64(Interpreter):
    """Runs a graph with every floating weight, constant and conversion in float64."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.double() if value.is_floating_point() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate(args, _promote), map_aggregate(kwargs, _promote)
        return super().call_function(target, args, kwargs)


def _promote(value: Any) -> Any:
    floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if floating else value


@contextmanager
def _default_float64() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def run_float64(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a program, computed in float64 throughout."""
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    with torch.no_grad(), _default_float64():
        return list(_InFloat64(program.graph_module).run(*inputs))


def run(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a program in its own dtypes."""
    program.graph_module.recompile()
    with torch.no_grad():
        return list(program.graph_module(*tensors))


def relative_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference over the rms of what was expected."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert torch.equal(a, b)
        elif b.numel():
            rms = b.double().square().mean().sqrt().clamp(min=1e-30)
            worst = max(worst, float((a.double() - b.double()).abs().max() / rms))
            assert torch.isfinite(b).all() or torch.equal(a, b)
    return worst


def assert_equivalent(ours: Program, theirs: Program, tensors: Sequence[Tensor]) -> None:
    """Two programs compute the same over the reals."""
    error = relative_error(run_float64(ours, tensors), run_float64(theirs, tensors))
    assert error <= 1e-10, f"error {error:.3g} of the output's rms"


def count(program: Program, target: Any) -> int:
    """How many calls of an operator a program holds."""
    return len(program.nodes(target))


def operators(program: Program) -> Counter[str]:
    """The operators of a program with their number, without those that compute sizes."""
    return Counter(
        str(node.target) for node in program.nodes() if isinstance(node.meta.get("val"), Tensor)
    )


def signature_of(program: Program) -> list[str]:
    """Every node as text: equal lists are equal graphs."""
    return [str(node.format_node()) for node in program.graph.nodes]
