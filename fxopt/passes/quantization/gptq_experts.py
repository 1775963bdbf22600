"""GPTQ of a mixture of experts: each expert by the tokens that the router sends it.

    minimize || Y_e V_e^T - Y_e Q_e^T ||^2 for each expert e,    Y_e = the rows t of Y with e chosen

Shapes: Y [tokens, in]; V_e and Q_e [out, in]. What the second linear of an expert reads is what the
    first gives once it is rounded. An expert that no token is sent to is rounded to nearest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.errors import CalibrationError
from fxopt.ir.operators.moe import expert_hidden
from fxopt.passes.quantization.grid import Grid, encode_by_rows, encoded, stacked
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.seen_inputs import SeenInputs

# Rows [n, in] in each batch, of the model as it is and of the original, if it is known.
Rows = tuple[Sequence[Tensor], Sequence[Tensor] | None]


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


@dataclass
class RoundedExperts:
    """Codes of both linears of all experts, and what is to be said of them."""

    gate_up: list[tuple[Grid, Tensor]] = field(default_factory=list[tuple[Grid, Tensor]])
    down: list[tuple[Grid, Tensor]] = field(default_factory=list[tuple[Grid, Tensor]])
    shares: list[float] = field(default_factory=list[float])
    unreached: list[int] = field(default_factory=list[int])
    short_of_tokens: list[int] = field(default_factory=list[int])

    def stacks(self) -> tuple[tuple[Grid, Tensor], tuple[Grid, Tensor]]:
        """Grid and codes [E, out, in] of either linear."""
        return stacked(self.gate_up), stacked(self.down)

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
                f"{path}: no token of the calibration data was sent to {_experts(self.unreached)}; "
                "rounded to nearest; data that uses them would help"
            )
        if self.short_of_tokens:
            notes.append(
                f"{path}: {_experts(self.short_of_tokens)} had fewer tokens than inputs: damping "
                "decides the rest; more calibration data would help"
            )
        return notes


def _experts(numbers: list[int]) -> str:
    return f"expert{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def expert_of(node: Node, value: Callable[[Any], Tensor], number: int) -> Expert:
    """One expert of a mixture, whose weights `value` gives."""
    gate_up, down, bias, _, activation, gated = node.args[3:9]
    own_bias = None if bias is None else value(bias)[number]
    parts = (value(gate_up)[number], value(down)[number], own_bias)
    return Expert(*parts, str(activation), bool(gated))


def round_experts(
    experts: Sequence[Expert],
    rows: Rows,
    chosen: Sequence[Tensor],
    options: WeightOptions,
    seen: Callable[[Rows], SeenInputs],
    rounded: Callable[[SeenInputs, Tensor], Any],
    sequential: bool,
) -> RoundedExperts:
    """Round all experts of a mixture.

    Args:
        experts: their weights.
        rows: what the mixture reads.
        chosen: which experts each row is sent to, [n, k] in each batch.
        options: how weights are stored.
        seen: what GPTQ knows of an input.
        rounded: a weight that reads it, rounded.
        sequential: whether the second linear reads what the rounded first one gives.

    Raises:
        CalibrationError: what an expert reads has no Hessian.
    """
    result = RoundedExperts()
    for number, expert in enumerate(experts):
        given = _sent_to(number, rows, chosen)
        if not sum(len(part) for part in given[0]):
            result.unreached.append(number)
            result.gate_up.append(encoded(expert.gate_up, options))
            result.down.append(encoded(expert.down, options))
            continue
        try:
            first = rounded(inputs := seen(given), expert.gate_up)
            up = first.values if sequential else expert.gate_up
            present = [expert.hidden(part, up) for part in given[0]]
            original = given[1] and [expert.hidden(part, expert.gate_up) for part in given[1]]
            second = rounded(hidden := seen((present, original)), expert.down)
        except CalibrationError as error:
            raise CalibrationError(f"expert {number}: {error}") from error
        result.gate_up.append((first.grid, encode_by_rows(first.grid, first.values)))
        result.down.append((second.grid, encode_by_rows(second.grid, second.values)))
        result.shares += [first.share, second.share]
        if any(len(each.hessian.order) > each.tokens for each in (inputs, hidden)):
            result.short_of_tokens.append(number)
    return result


def _sent_to(number: int, rows: Rows, chosen: Sequence[Tensor]) -> Rows:
    masks = [(part == number).any(1) for part in chosen]
    present, original = rows
    of_original = original and [part[mask] for part, mask in zip(original, masks, strict=True)]
    return [part[mask] for part, mask in zip(present, masks, strict=True)], of_original
