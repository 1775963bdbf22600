"""Compare shapes that may be symbolic, without adding a fact about any size."""

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import dtype_of, shape_of


def fixed(size: Any) -> int | None:
    """The number, if the size is known to be one; capture may know it under a symbol."""
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int()
    return size if isinstance(size, int) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; False also where it is not known."""
    a, b = _expression(a), _expression(b)
    return a is b or bool(a == b)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two lists of sizes are known to be equal."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes are tensors of one shape."""
    both = all(isinstance(node.meta.get("val"), torch.Tensor) for node in (a, b))
    return both and same_sizes(shape_of(a), shape_of(b))


def same_type(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of one shape and dtype on one device."""
    return (
        isinstance(a, Node)
        and isinstance(b, Node)
        and same_shape(a, b)
        and dtype_of(a) == dtype_of(b)
        and a.meta["val"].device == b.meta["val"].device
    )


def same_value(a: Any, b: Any) -> bool:
    """Whether two size arguments of calls (numbers or nodes) are known to be equal."""
    return a is b or same_size(
        a.meta.get("val") if isinstance(a, Node) else a,
        b.meta.get("val") if isinstance(b, Node) else b,
    )


def axis_of(node: Node, axis: int) -> int:
    """An axis counted from the front."""
    return axis % len(shape_of(node))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
