"""Linears and embeddings in float64 without their whole weight in float64."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Large enough that a product is not slowed down, small beside the weights of any real model.
_ROWS_BYTES = 4 << 20


class ByRows:
    """Converts a weight a few rows at a time, into memory that all weights share.

    A float64 copy of a vocabulary's table is twice the table; and copies that come and go between
    the activations of a run leave holes that the C library cannot give back.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(0, dtype=torch.float64)

    def call(self, target: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The operator's result in float64, or None where it is best called as a whole."""
        if target is aten.embedding.default and _is_narrow(args[0]):
            return target(*args).double()  # rows are looked up, not computed with
        if target is aten.linear.default and _is_narrow(args[1]) and args[1].dim() == 2:
            return self._linear(*args) if args[1].numel() * 8 > _ROWS_BYTES else None
        return None

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x.double()
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = max(1, _ROWS_BYTES // (8 * weight.shape[1]))
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            result[..., part] = torch.matmul(x, self._converted(weight[part]).t())
        return result if bias is None else result.add_(bias.double())

    def _converted(self, rows: Tensor) -> Tensor:
        if self.scratch.numel() < rows.numel() or self.scratch.device != rows.device:
            self.scratch = torch.empty(rows.numel(), dtype=torch.float64, device=rows.device)
        return self.scratch[: rows.numel()].view(rows.shape).copy_(rows)


def _is_narrow(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
