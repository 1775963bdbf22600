"""Recompute the recorded shapes of a loaded graph, on fake tensors with symbolic sizes."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate

from fxopt.ir.program import Program
from fxopt.ir.signature import TensorSpec

logger = logging.getLogger(__name__)


def example_sizes(program: Program) -> dict[str, int]:
    """A size for each varying dimension at which the program is known to run.

    Dimensions that are computed from one another (past, sequence, past + sequence) agree only in
    an example, so one example is stored.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    sizes: dict[str, int] = {}
    for node, spec in zip(placeholders, program.signature.inputs, strict=True):
        recorded = node.meta.get("val")
        if not isinstance(recorded, Tensor):
            return {}
        for size, dimension in zip(recorded.shape, spec.shape, strict=True):
            if isinstance(dimension, str):
                # A size that is no plain number is a SymInt, whatever its annotation says.
                symbolic: Any = getattr(size, "node", None)
                hint = size if symbolic is None else symbolic.hint
                if hint is None:
                    return {}
                sizes.setdefault(dimension, int(hint))
    return sizes


def restore_shapes(program: Program, sizes: dict[str, int]) -> bool:
    """Record `meta["val"]` on every node; on failure no node has one, and the answer is False.

    A program runs without recorded shapes; only further passes need them.
    """
    try:
        values = _propagate(program, sizes)
    except Exception as error:  # a fake kernel may refuse in any way; the graph still runs
        logger.info("the shapes of the loaded graph could not be recomputed: %s", error)
        return False
    for node, value in values.items():
        node.meta["val"] = value
    return True


def _propagate(program: Program, sizes: dict[str, int]) -> dict[Node, Any]:
    env = ShapeEnv(prefer_deferred_runtime_asserts_over_guards=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    inputs = iter(_fake_inputs(program, mode, env, sizes))
    values: dict[Node, Any] = {}

    def value_of(argument: Any) -> Any:
        return values[argument] if isinstance(argument, Node) else argument

    # Loading adds no facts about sizes: every question is answered by the example.
    with torch.no_grad(), env.suppress_guards(), enable_python_dispatcher():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                weight = program.weight(str(node.target))
                values[node] = mode.from_tensor(weight, static_shapes=True)
            elif node.op == "call_function":
                args, kwargs = map_aggregate((node.args, node.kwargs), value_of)  # type: ignore[misc]
                with mode:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _fake_inputs(
    program: Program, mode: FakeTensorMode, env: ShapeEnv, sizes: dict[str, int]
) -> list[Tensor]:
    symbols: dict[str, Any] = {}

    def size_of(dimension: int | str) -> Any:
        if isinstance(dimension, int):
            return dimension
        if dimension not in symbols:
            source = ConstantSource(f"size_{len(symbols)}")
            # A size that is 0 in the example varies like the others.
            symbol = env.create_symbol(
                sizes[dimension],
                source,
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
                positive=None,
                do_not_specialize_zero_one=True,
            )
            symbols[dimension] = env.create_symintnode(symbol, hint=sizes[dimension], source=source)
        return symbols[dimension]

    def fake(spec: TensorSpec) -> Tensor:
        with mode:
            return torch.empty([size_of(dimension) for dimension in spec.shape], dtype=spec.dtype)

    return [fake(spec) for spec in program.signature.inputs]
