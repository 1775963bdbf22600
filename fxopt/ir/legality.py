"""What a program may contain at each level, and whether what it records about itself is true."""

from typing import Any

import torch
from torch.fx import Node

from fxopt.errors import IllegalGraphError
from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.program import Level, Program, hints

# Operators that the levels after capture no longer hold, with the reason.
_ONLY_CAPTURED = {
    "aten::dropout": "dropout does nothing at inference",
    "aten::alpha_dropout": "dropout does nothing at inference",
    "aten::feature_dropout": "dropout does nothing at inference",
}
_ONLY_QUANTIZED = (
    *("fxopt::quantize", "fxopt::dequantize", "fxopt::choose_qparams"),
    *("fxopt::pack", "fxopt::unpack", "fxopt::lookup"),
)
_NAMESPACES = (
    "aten",
    "fxopt",
    "prims",
    "_operator",
    "math",
    "torch",
    "builtins",
    "_c10d_functional",
)


def check_program(program: Program, shapes: bool = True) -> None:
    """Check structure, level and recorded shapes of a program.

    Raises:
        IllegalGraphError: the graph is malformed, reads a weight that is not there, holds one
            that nothing reads, an operator that its level does not allow, or a recorded shape
            or dtype that differs from what the operator returns.
    """
    try:
        program.graph.lint()
    except Exception as error:
        raise IllegalGraphError(f"the graph is malformed: {error}") from error
    _check_weights(program)
    for node in program.nodes():
        reason = illegal(node, program.level)
        if reason is not None:
            raise IllegalGraphError(f"node {node.name!r} ({node.target}): {reason}")
    if shapes:
        _check_shapes(program)


def illegal(node: Node, level: Level) -> str | None:
    """Why a call may not stand in a program of this level, or None."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        module = getattr(node.target, "__module__", "")
        return None if module in _NAMESPACES else f"{module!r} functions are not operators"
    if level >= Level.CANONICAL:
        if schema.name in _ONLY_CAPTURED:
            return _ONLY_CAPTURED[schema.name]
        if schema.is_mutable:
            return "an operator that writes to its input is not allowed after canonicalization"
    if level < Level.QUANTIZED and schema.name in _ONLY_QUANTIZED:
        return f"quantization operators need level QUANTIZED, the program is {level.name}"
    return None


def _check_weights(program: Program) -> None:
    held = program.weights()
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in held:
            raise IllegalGraphError(f"node {node.name!r} reads weight {name!r}, which is not held.")
        if name in read:
            raise IllegalGraphError(f"weight {name!r} is read by two get_attr nodes.")
        read.add(name)
    unread = sorted(set(held) - read)
    if unread:
        raise IllegalGraphError(f"weights that nothing reads: {', '.join(unread[:5])}.")


def _check_shapes(program: Program) -> None:
    mode = fake_mode(program)
    weights = program.weights()
    for node in program.graph.nodes:
        recorded = node.meta.get("val")
        if node.op == "get_attr":
            actual: Any = weights[str(node.target)]
        elif node.op == "call_function":
            actual = infer(node, mode)
        else:
            continue
        _compare(node, recorded, actual)


def _compare(node: Node, recorded: Any, actual: Any) -> None:
    if isinstance(actual, list | tuple):
        if not isinstance(recorded, list | tuple) or len(recorded) != len(actual):
            raise IllegalGraphError(f"node {node.name!r} records {recorded}, returns {actual}.")
        for a, b in zip(recorded, actual, strict=True):
            _compare(node, a, b)
    elif isinstance(actual, torch.Tensor):
        same = (
            isinstance(recorded, torch.Tensor)
            and recorded.dtype == actual.dtype
            and hints(recorded.shape) == hints(actual.shape)
        )
        if not same:
            raise IllegalGraphError(
                f"node {node.name!r} ({node.target}) records {_describe(recorded)} and returns "
                f"{_describe(actual)}."
            )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
