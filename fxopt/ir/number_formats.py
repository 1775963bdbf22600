"""The number formats that weights and activations are stored in, each fact about them once.

An integer format holds `bits` bits in two's complement; a floating format is one of torch's own; a
codebook format holds indices into a table of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fxopt.errors import RecipeError


@dataclass(frozen=True)
class NumberFormat:
    """How one stored number looks.

    Attributes:
        name: what a recipe calls it.
        kind: integers are rounded, floating formats cast, codebook formats looked up.
        bits: of one number on disk and in memory; below 8 several are packed into a byte.
        storage: the dtype of one number before it is packed.
        low: the smallest integer, or the negative of the largest finite number.
        high: the largest.
        table: makes the values of a codebook that is the same for every weight.
    """

    name: str
    kind: Literal["integer", "floating", "codebook"]
    bits: int
    storage: torch.dtype
    low: int
    high: int
    table: Callable[[], Tensor] | None = None

    @property
    def signed(self) -> bool:
        """Whether packed bits are read in two's complement."""
        return self.kind == "integer"

    def range(self, symmetric: bool) -> tuple[int, int]:
        """The smallest and largest number; symmetric without the smallest integer.

        Negation then stays exact.
        """
        return (-self.high, self.high) if symmetric else (self.low, self.high)

    def codebook(self) -> Tensor:
        """The values of a codebook format, ascending, in [-1, 1]."""
        if self.table is None:
            raise RecipeError(f"{self.name} has no fixed table of values.")
        return self.table()


def _integer(bits: int) -> NumberFormat:
    half = 1 << (bits - 1)
    return NumberFormat(f"int{bits}", "integer", bits, torch.int8, -half, half - 1)


def codebook_format(bits: int) -> NumberFormat:
    """Indices of `bits` bits into a table that is learned for each weight."""
    return NumberFormat(f"codebook{bits}", "codebook", bits, torch.uint8, 0, (1 << bits) - 1)


@cache
def _normal_float4() -> Tensor:
    """Quantiles of the normal distribution, eight above zero and seven below, scaled to [-1, 1].

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023,
    arXiv:2305.14314, appendix E.
    """
    # The outermost quantile lies half way between those of 15 and of 16 equal shares.
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([below, above])
    return (values / values.abs().max()).sort().values.float()


FORMATS: dict[str, NumberFormat] = {
    **{f"int{bits}": _integer(bits) for bits in (8, 4, 3, 2)},
    "fp8_e4m3": NumberFormat("fp8_e4m3", "floating", 8, torch.float8_e4m3fn, -448, 448),
    "fp8_e5m2": NumberFormat("fp8_e5m2", "floating", 8, torch.float8_e5m2, -57344, 57344),
    "nf4": NumberFormat("nf4", "codebook", 4, torch.uint8, -1, 1, _normal_float4),
}
