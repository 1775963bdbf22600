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

    @staticmethod
    def of(
        rows: Sequence[Tensor],
        original: Sequence[Tensor] | None,
        damping: float,
        act_order: bool,
    ) -> "SeenInputs":
        """From the input's rows [n, in] in each batch, and those of the original model.

        Raises:
            CalibrationError: there are no rows, or they have no Hessian.
        """
        h = hessian(rows, damping, act_order)
        alike = original is not None and [len(x) for x in original] == [len(y) for y in rows]
        return SeenInputs(
            hessian=h,
            # An expert may be shown zeros in place of the tokens that are routed elsewhere.
            tokens=sum(int(part.any(1).sum()) for part in rows),
            mean=_mean(rows),
            original_mean=_mean(rows if original is None else original),
            change=InputChange(original, rows, h.moments) if original and alike else None,
        )

    def rounded(
        self, weight: Tensor, options: WeightOptions, block_size: int, static_groups: bool
    ) -> Compensated:
        """A weight [out, in] that reads this input, rounded."""
        aim = weight if self.change is None else self.change.make_up(weight)
        return compensated(aim, options, self.hessian, block_size, static_groups)


def _mean(rows: Sequence[Tensor]) -> Tensor:
    total = torch.stack([part.sum(0, dtype=torch.float64) for part in rows]).sum(0)
    return total / max(1, sum(len(part) for part in rows))
