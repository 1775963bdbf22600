"""GPTQ of a mixture of experts: each expert by the tokens that the router sends it.

    minimize || Y_e V_e^T - Y_e Q_e^T ||^2 for each expert e,    Y_e = the rows t of Y with e chosen

Shapes: Y [tokens, in]; V_e and Q_e [out, in]. What the second linear of an expert reads is what the
    first gives once it is rounded. An expert that no token is sent to is rounded to nearest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.errors import CalibrationError
from fxopt.ir.operators.moe import expert_hidden
from fxopt.passes.quantization.grid import Grid, Stack, encode_by_rows, encoded
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.seen_inputs import ColumnRounding, Rows, SeenInputs


@dataclass(frozen=True)
class Expert:
    """The weights of one expert, and how it computes."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    activation: str
    gated: bool

    def hidden(self, rows: Tensor, gate_up: Tensor) -> Tensor:
        """What its second linear reads."""
        wide = gate_up.float()
        bias = None if self.gate_up_bias is None else self.gate_up_bias.float()
        product = torch.nn.functional.linear(rows.float(), wide, bias)
        return expert_hidden(product, self.activation, self.gated)


def expert_of(node: Node, value: Callable[[Any], Tensor], number: int) -> Expert:
    """One expert of a mixture, whose weights `value` gives."""
    gate_up, down, bias, _, activation, gated = node.args[3:9]
    own_bias = None if bias is None else value(bias)[number]
    parts = (value(gate_up)[number], value(down)[number], own_bias)
    return Expert(*parts, str(activation), bool(gated))


class ExpertRounding:
    """The experts of one mixture while they are rounded, and what is to be said of them."""

    def __init__(self, count: int, rounding: ColumnRounding, options: WeightOptions) -> None:
        self.rounding = rounding
        self.options = options
        self.gate_up, self.down = Stack(count), Stack(count)
        self.shares: list[float] = []
        self.unreached: list[int] = []
        self.short_of_tokens: list[int] = []
        self.damped: dict[int, float] = {}

    def add(self, number: int, expert: Expert, rows: Rows) -> None:
        """Round the next expert by the rows that it is sent.

        Raises:
            CalibrationError: what it reads has no Hessian.
        """
        present, original = rows
        if not sum(len(part) for part in present):
            self.unreached.append(number)
            self.gate_up.add(*encoded(expert.gate_up, self.options))
            self.down.add(*encoded(expert.down, self.options))
            return
        gate_up = self._linear(number, expert.gate_up, rows, self.gate_up)
        read = gate_up if self.rounding.true_sequential else expert.gate_up
        hidden = [expert.hidden(part, read) for part in present]
        exact = None
        if original is not None:
            exact = [expert.hidden(part, expert.gate_up) for part in original]
        self._linear(number, expert.down, (hidden, exact), self.down)

    def _linear(self, number: int, weight: Tensor, rows: Rows, stack: Stack) -> Tensor:
        """The values of a linear's rounded weight, which is put on the stack."""
        try:
            inputs = self.rounding.seen(rows)
        except CalibrationError as error:
            raise CalibrationError(f"expert {number}: {error}") from error
        found = self.rounding.rounded(inputs, weight, self.options)
        stack.add(found.grid, encode_by_rows(found.grid, found.values))
        self.shares.append(found.share)
        self._remember(number, inputs)
        return found.values

    def _remember(self, number: int, inputs: SeenInputs) -> None:
        if inputs.tokens < len(inputs.hessian.order) and number not in self.short_of_tokens:
            self.short_of_tokens.append(number)
        if inputs.hessian.damping != self.rounding.damping:
            self.damped[number] = max(self.damped.get(number, 0), inputs.hessian.damping)

    def encoded(self) -> tuple[tuple[Grid, Tensor], tuple[Grid, Tensor]]:
        """Grid and codes [E, out, in] of either linear."""
        return self.gate_up.encoded(), self.down.encoded()

    def detail(self) -> str:
        """For the report: how much less the outputs err."""
        if not self.shares:
            return "rounded to nearest"
        mean = sum(self.shares) / len(self.shares)
        return f"mean output error {mean:.2f}x of rounding to nearest"

    def notes(self, path: str) -> list[str]:
        """What calibration left open."""
        notes: list[str] = []
        if self.unreached:
            notes.append(
                f"{path}: no token of the calibration data was sent to {_named(self.unreached)}; "
                "rounded to nearest; data that uses them would help"
            )
        if self.short_of_tokens:
            notes.append(
                f"{path}: {_named(self.short_of_tokens)} had fewer tokens than inputs: damping "
                "decides the rest; more calibration data would help"
            )
        if self.damped:
            notes.append(
                f"{path}: {_named(list(self.damped))} needed damping of up to "
                f"{max(self.damped.values()):g} to be positive definite"
            )
        return notes


def _named(numbers: Sequence[int]) -> str:
    return f"expert{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def sent_to(number: int, rows: Rows, chosen: Sequence[Tensor]) -> Rows:
    """Of the rows that a mixture reads those that choose an expert, by `chosen` [n, k]."""
    masks = [(part == number).any(1) for part in chosen]
    present, original = rows
    of_original = None
    if original is not None:
        of_original = [part[mask] for part, mask in zip(original, masks, strict=True)]
    return [part[mask] for part, mask in zip(present, masks, strict=True)], of_original
