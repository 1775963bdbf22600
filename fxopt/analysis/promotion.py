"""A float64 twin of a program, on which a pass can be run and judged without rounding."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from fxopt.analysis.execution import promote
from fxopt.ir.inference import fake_mode, infer
from fxopt.ir.program import Program, iterate_weights


class EditedWeights:
    """Keeps float64 tensors in memory up to a limit, and in temporary files beyond it."""

    def __init__(self, memory_bytes: int) -> None:
        self.left = memory_bytes

    def keep(self, value: Tensor) -> Tensor:
        """The same values, held where there is room for them."""
        size = value.numel() * value.element_size()
        if value.device.type != "cpu" or size <= self.left:
            self.left -= size
            return value
        try:
            return on_disk(value)
        except OSError:
            return value  # no room on the disk either: memory is what remains


@dataclass
class Float64Twin(Program):
    """A program whose weights read as float64, of which only the edited ones are held so.

    All others are those of the program it came from, converted at each read and freed after it:
    `weight`, `constant`, `weights` and the interpreters of `analysis.execution` see float64. A
    call of `graph_module` itself would see the stored dtypes.
    """

    edits: EditedWeights = field(default_factory=lambda: EditedWeights(0))

    def weight(self, name: str) -> Tensor:
        """One tensor, in float64 if it is floating."""
        return promote(super().weight(name))

    def weights(self) -> Mapping[str, Tensor]:
        """Every tensor by name, converted when it is asked for."""
        return _PromotedWeights(dict(iterate_weights(self.graph_module)))

    def set_weight(self, name: str, value: Tensor) -> None:
        """Store an edit exactly as it was computed."""
        super().set_weight(name, self.edits.keep(value))


class _PromotedWeights(Mapping[str, Tensor]):
    def __init__(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return promote(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def on_disk(value: Tensor) -> Tensor:
    """The same values in a file without a name, which the system reads in where they are used.

    Raises:
        OSError: there is no room for the file.
    """
    with tempfile.NamedTemporaryFile(prefix="fxopt-") as file:
        value.contiguous().numpy().tofile(file)
        file.flush()
        # The mapping outlives the file's name, so nothing is left behind however this ends.
        stored = torch.from_file(file.name, False, value.numel(), dtype=value.dtype)
    return stored.view(value.shape)


def promote_program(program: Program, memory_bytes: int) -> Float64Twin:
    """A copy whose weights, constants, conversions and recorded dtypes are float64.

    What a pass writes into such a copy is exact to 1e-16, so that a wrong edit cannot hide
    behind the rounding of the model's own dtype. Of these edits `memory_bytes` are kept in
    memory.
    """
    copied = program.clone()
    twin = Float64Twin(**vars(copied), edits=EditedWeights(memory_bytes))
    mode = fake_mode(program)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for node in twin.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                node.meta = {**node.meta, "val": _promote_fake(node.meta.get("val"), mode)}
            elif node.op == "call_function":
                node.args = map_aggregate(node.args, promote)  # type: ignore[assignment]
                node.kwargs = map_aggregate(node.kwargs, promote)  # type: ignore[assignment]
                # What was inferred is promoted already, what was only recorded is not.
                found = map_aggregate(infer(node, mode), lambda value: _promote_fake(value, mode))
                node.meta = {**node.meta, "val": found}
    finally:
        torch.set_default_dtype(default)
    twin.graph_module.recompile()
    return twin


def _promote_fake(value: Any, mode: Any) -> Any:
    with mode:
        return promote(value)
