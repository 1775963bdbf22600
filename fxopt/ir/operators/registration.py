"""How an operator joins the `fxopt::` namespace."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fxopt", "FRAGMENT")

# The plain torch that an operator stands for, by the operator: autograd sees through it.
REFERENCES: dict[Any, Callable[..., Any]] = {}


def define(schema: str, reference: Any, fake: Any) -> None:
    """Define an operator by its schema, its plain torch reference and its fake implementation."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)
    REFERENCES[getattr(torch.ops.fxopt, name).default] = reference
