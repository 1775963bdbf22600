"""What GPTQ knows of the input of a linear: its Hessian, its means, and how rounding changed it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.passes.quantization.compensation import (
    Compensated,
    Hessian,
    compensated,
    hessian,
)
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.original_inputs import InputChange

# Rows [n, in] of an input in each batch, and those of the original model where they are known.
Rows = tuple[Sequence[Tensor], Sequence[Tensor] | None]


@dataclass(frozen=True)
class SeenInputs:
    """What linears that share an input know of it.

    Attributes:
        hessian: of the squared error of their outputs.
        tokens: how many of the input's rows are not zero.
        mean, original_mean: of the input as it is, and as the original model gives it.
        change: from the one to the other; None where nothing is to be made up for.
    """

    hessian: Hessian
    tokens: int
    mean: Tensor
    original_mean: Tensor
    change: InputChange | None


@dataclass(frozen=True)
class ColumnRounding:
    """How GPTQ rounds a weight by the input that it reads."""

    damping: float
    act_order: bool
    block_size: int
    static_groups: bool
    true_sequential: bool

    def seen(self, rows: Rows) -> SeenInputs:
        """What is known of an input.

        Raises:
            CalibrationError: there are no rows, or they have no Hessian.
        """
        present, original = rows
        h = hessian(present, self.damping, self.act_order)
        change = None
        if original is not None and [len(x) for x in original] == [len(y) for y in present]:
            change = InputChange(original, present, h.moments)
        return SeenInputs(
            hessian=h,
            # An expert may be shown zeros in place of the tokens that are routed elsewhere.
            tokens=sum(int(part.any(1).sum()) for part in present),
            mean=_mean(present),
            original_mean=_mean(present if original is None else original),
            change=change,
        )

    def rounded(self, inputs: SeenInputs, weight: Tensor, options: WeightOptions) -> Compensated:
        """A weight [out, in] that reads an input."""
        aim = weight if inputs.change is None else inputs.change.make_up(weight)
        return self.by_hessian(inputs.hessian, aim, options)

    def by_hessian(self, h: Hessian, weight: Tensor, options: WeightOptions) -> Compensated:
        """A weight [out, in] as it is, by the Hessian of what reads it."""
        return compensated(weight, options, h, self.block_size, self.static_groups)


def _mean(rows: Sequence[Tensor]) -> Tensor:
    total = torch.stack([part.sum(0, dtype=torch.float64) for part in rows]).sum(0)
    return total / max(1, sum(len(part) for part in rows))
