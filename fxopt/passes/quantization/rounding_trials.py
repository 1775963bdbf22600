"""What a program gives when some of its linears are stored in few bits, without storing them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.curvature import eigenvalues, traces
from fxopt.analysis.lockstep import Instead, Lockstep
from fxopt.analysis.output_error import OutputError
from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program
from fxopt.passes.quantization.activations import round_by_token
from fxopt.passes.quantization.assignment import Matrix
from fxopt.passes.quantization.grid import choose_grid, encode_by_rows
from fxopt.passes.quantization.linear_groups import LinearGroup
from fxopt.passes.quantization.options import Choice
from fxopt.rewrite.builder import first_call

aten = torch.ops.aten
Progress = Callable[[str], None]
Sensitivity = Literal["output", "trace", "eigenvalue"]


class Trials:
    """Runs of a program with choices for its groups of linears, rounded to nearest."""

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sample],
        groups: Sequence[LinearGroup],
        choices: Sequence[Choice],
    ) -> None:
        self.program = program
        self.samples = samples
        self.groups = groups
        self.choices = choices
        self.whole = Lockstep(program, samples)
        self.whole.begin()
        self.error = OutputError.of(program, samples, self._outputs({}))

    def outputs(self, chosen: Sequence[int]) -> list[list[Tensor]]:
        """What each batch gives when every group follows its choice."""
        instead: dict[Node, Instead] = {}
        for group, choice in zip(self.groups, chosen, strict=True):
            instead |= self._instead(group, self.choices[choice])
        return self._outputs(instead)

    def losses(self, sensitivity: Sensitivity, probes: int, progress: Progress) -> Matrix:
        """What each choice costs the output in each group, [groups, choices]."""
        if sensitivity == "output":
            return self._by_output(progress)
        linears = [linear for group in self.groups for linear in group.linears]
        measure = traces if sensitivity == "trace" else eigenvalues
        found = measure(self.program, self.samples, linears, probes, progress)
        bends: dict[Node, float] = {}
        for linear, value in zip(linears, found, strict=True):
            share = self._weight(linear).numel() if sensitivity == "trace" else 1
            bends[linear] = max(value, 0.0) / (2 * share)
        rows = [
            [
                sum(bends[n] * self._squares(n, choice) for n in group.linears)
                for choice in self.choices
            ]
            for group in self.groups
        ]
        return np.array(rows)

    def _by_output(self, progress: Progress) -> Matrix:
        first = {group.linears[0]: index for index, group in enumerate(self.groups)}
        found = np.zeros((len(self.groups), len(self.choices)))
        lockstep = Lockstep(self.program, self.samples)

        def visit(node: Node) -> None:
            row = first.get(node)
            if row is None:
                return
            progress(f"group {row + 1}/{len(self.groups)}")
            for column, choice in enumerate(self.choices):
                instead = self._instead(self.groups[row], choice)
                found[row, column] = self.error.cost(list(lockstep.outputs(node, instead)))

        lockstep.run(visit)
        return found

    def _outputs(self, instead: dict[Node, Instead]) -> list[list[Tensor]]:
        return list(self.whole.outputs(first_call(self.program), instead))

    def _instead(self, group: LinearGroup, choice: Choice) -> dict[Node, Instead]:
        if choice == Choice():
            return {}
        return {linear: self._rounded_linear(linear, choice) for linear in group.linears}

    def _rounded_linear(self, linear: Node, choice: Choice) -> Instead:
        weight = self._rounded(linear, choice)
        source: Any = linear.args[0]
        bias: Any = linear.args[2] if len(linear.args) > 2 else None

        def compute(load: Callable[[Node], Any]) -> Tensor:
            x = load(source)
            if choice.activations is not None:
                x = round_by_token(x, choice.activations)
            return aten.linear.default(x, weight, None if bias is None else load(bias))

        return compute

    def _rounded(self, linear: Node, choice: Choice) -> Tensor:
        weight = self._weight(linear)
        if choice.weights is None:
            return weight
        grid = choose_grid(weight, choice.weights)
        return grid.decode(encode_by_rows(grid, weight), weight.dtype)

    def _squares(self, linear: Node, choice: Choice) -> float:
        """|| Q(W) - W ||^2."""
        weight = self._weight(linear)
        return float((self._rounded(linear, choice).float() - weight.float()).square().sum())

    def _weight(self, linear: Node) -> Tensor:
        weight: Any = linear.args[1]
        return self.program.weight(str(weight.target))
