"""Which operators a stored graph may name: nothing that is not on these lists is ever called.

A stored graph names its operators; loading looks them up among the overloads of two namespaces
and in a table of plain functions. It imports nothing and evaluates nothing that the folder names.
Of ATen only operators that check their arguments are called (`fxopt.runtime.stored_aten`), and
none that takes anything but tensors, numbers, strings and the like (files, storages, streams,
arbitrary objects).
"""

import importlib
import math
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.runtime.stored_aten import may_be_stored

NAMESPACES = ("aten", "fxopt")
# transformers writes these into the graphs of models whose experts are not taken whole.
FOREIGN = ("transformers.grouped_mm_fallback.default",)

_OVERLOAD = re.compile(r"([a-z]+)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_BASE_TYPES = {
    *("Tensor", "int", "float", "bool", "number", "complex", "str", "Device", "Generator"),
    *("SymInt", "SymFloat", "SymBool", "ScalarType", "Layout", "MemoryFormat"),
}
_FILE_ARGUMENTS = {"filename", "path", "file"}

# What torch.export writes for the arithmetic of sizes, and how results are unpacked.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert"),
            *("lshift", "rshift", "getitem", "index"),
        )
    },
    **{
        f"math.{name}": getattr(math, name)
        for name in ("ceil", "floor", "trunc", "sqrt", "cos", "sin", "exp", "log", "log2", "pow")
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in (
            *("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum"),
            "sym_sqrt",
        )
        if hasattr(torch, name)
    },
    **{f.__name__: f for f in (abs, bool, float, int, max, min, round)},
}


@cache
def _function_names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in FUNCTIONS.items()}


def name_of_target(target: Any) -> str | None:
    """The name under which a call target is stored, or None if it cannot be."""
    if isinstance(target, OpOverload):
        name = str(target)
        return name if target_of_name(name) is target else None
    try:
        return _function_names().get(target)
    except TypeError:  # not hashable
        return None


def target_of_name(name: str) -> Callable[..., Any] | None:
    """The operator or function of that name, or None if it is unknown or not allowed."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    found = _OVERLOAD.fullmatch(name)
    # Operators register when their module is imported; these imports name modules of ours.
    if found is None or not (found[1] in NAMESPACES or name in FOREIGN):
        return None
    overload = _overload(found[1], found[2], found[3])
    if overload is None and found[1] == "fxopt":
        importlib.import_module("fxopt.ir.operators")
        importlib.import_module("fxopt.kernels")
        overload = _overload(found[1], found[2], found[3])
    if overload is None and name in FOREIGN:
        importlib.import_module("transformers.integrations.moe")
        overload = _overload(found[1], found[2], found[3])
    if overload is None or str(overload) != name or not _takes_plain_values(overload):
        return None
    return overload if found[1] != "aten" or may_be_stored(overload) else None


def _overload(namespace: str, packet: str, name: str) -> OpOverload | None:
    found: Any = getattr(torch.ops, namespace)
    for part in (packet, name):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            return None
    return found if isinstance(found, OpOverload) else None


def _takes_plain_values(overload: Any) -> bool:
    for argument in overload._schema.arguments:
        base = str(argument.type)
        while inner := re.fullmatch(r"(?:Optional|List)\[(.*)\]", base):
            base = inner[1]
        names_a_file = base == "str" and argument.name in _FILE_ARGUMENTS
        if base not in _BASE_TYPES or names_a_file:
            return False
    return True
