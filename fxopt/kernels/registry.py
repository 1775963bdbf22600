"""The table of operators, and how a folder adds itself to it.

`register_reference` defines an operator from its schema and its plain torch reference;
`register_fake`, `register_aten` and `register_cuda` add to what is there. Native CPU code
registers itself with the dispatcher when `fxopt.kernels.native.build` loads it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fxopt.errors import KernelError

__all__ = [
    "KERNELS",
    "LIBRARY",
    "Kernel",
    "register_aten",
    "register_cuda",
    "register_fake",
    "register_reference",
]

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("fxopt", "FRAGMENT")


@dataclass(eq=False)
class Kernel:
    """One operator: its overload, its reference, and what implements it faster.

    Attributes:
        name: The operator is `torch.ops.fxopt.<name>` and its folder `fxopt/kernels/<name>`.
        overload: What a graph calls.
        reference: The definition in plain torch.
        aten: CPU implementation of ATen operators, for where native code cannot be built.
        cuda: Module whose `launch` runs the operator on a GPU.
    """

    name: str
    overload: Callable[..., Any]
    reference: Callable[..., Any]
    aten: Callable[..., Any] | None = None
    cuda: str | None = None

    @property
    def folder(self) -> Path:
        """Where the operator's files are."""
        return Path(__file__).parent / self.name

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets with an implementation of their own beside the reference."""
        cpu = ("cpu",) if (self.folder / "cpu.cpp").exists() else ()
        return cpu + (("cuda",) if self.cuda else ())


KERNELS: dict[str, Kernel] = {}


def register_reference(schema: str) -> Callable[[Function], Function]:
    """Define `fxopt::<schema>` by the decorated function, on every device.

    Raises:
        KernelError: The operator is defined already.
    """
    name = schema.split("(", 1)[0]

    def register(reference: Function) -> Function:
        if name in KERNELS:
            raise KernelError(f"fxopt::{name} is defined twice; give the new operator its own name")
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        KERNELS[name] = Kernel(name, getattr(torch.ops.fxopt, name).default, reference)
        return reference

    return register


def register_fake(name: str) -> Callable[[Function], Function]:
    """Give `fxopt::<name>` its shapes and dtypes, symbolic sizes included."""

    def register(fake: Function) -> Function:
        torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)
        return fake

    return register


def register_aten(name: str) -> Callable[[Function], Function]:
    """Name the CPU implementation that stands in for native code; `ensure_native` installs it."""

    def register(aten: Function) -> Function:
        KERNELS[name].aten = aten
        return aten

    return register


def register_cuda(name: str, module: str) -> None:
    """Run `fxopt::<name>` on CUDA tensors by `module.launch`, imported at the first call.

    Triton is imported only then: it is slow to import, and absent where there is no GPU.
    """

    def launch(*args: Any) -> Any:
        return importlib.import_module(module).launch(*args)

    LIBRARY.impl(name, launch, "CUDA")
    KERNELS[name].cuda = module


LIBRARY.define("raise_kernel_error(str message) -> ()")


@torch.library.impl(LIBRARY, "raise_kernel_error", "CompositeExplicitAutograd")
def raise_kernel_error(message: str) -> None:
    """How native code raises a KernelError: the class lives on this side of the dispatcher."""
    raise KernelError(message)
