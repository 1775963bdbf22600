"""What a node returns, worked out on fake tensors."""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_aggregate

from fxopt.ir.program import Program


def fake_mode(program: Program) -> FakeTensorMode:
    """The fake tensor mode that the program's recorded values live in."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def infer(node: Node, mode: FakeTensorMode) -> Any:
    """What a call returns, on fake tensors; what was recorded where sizes depend on values."""

    def value(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, Node) else argument

    args = map_aggregate(node.args, value)
    kwargs = map_aggregate(node.kwargs, value)
    # torch 2.11 decomposes linear in C++ else, which cannot count elements of unknown sizes.
    with mode, torch.no_grad(), enable_python_dispatcher(), _no_new_guards(mode):
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except GuardOnDataDependentSymNode:
            if node.meta.get("val") is None:
                raise
            return node.meta["val"]


@contextlib.contextmanager
def _no_new_guards(mode: FakeTensorMode) -> Generator[None]:
    # Rewriting adds no facts about sizes: whatever a fake kernel asks is already known.
    env = mode.shape_env
    if env is None:
        yield
        return
    with env.suppress_guards():
        yield
