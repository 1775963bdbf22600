"""Weights whose outputs are those of the original model, on inputs that rounding has changed.

    minimize || X W^T - Y V^T ||^2 + ridge mean(diag H) || V - W ||^2
    V = W + W (X - Y)^T Y (H + ridge mean(diag H) I)^-1,    H = Y^T Y, damped as GPTQ needs it

Shapes: X [tokens, in] is what the original model gives a linear, Y [tokens, in] what the rounded
    linears before it give; W and V [out, in]. Then || X W^T - Y Q^T ||^2 is || Y V^T - Y Q^T ||^2
    for any Q, but for a constant and what the ridge leaves, so that rounding V makes up for the
    errors before it, too. The ridge keeps V from following the noise of few tokens.
Source: Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, ICML
    2025, arXiv:2504.02692. Deviation: a least-squares weight and a ridge, in place of a term in
    each step of the columns.
"""

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.lockstep import Lockstep
from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program

# On MiniLM, int4 per channel with output ranges, 0.3 erred less than 0.1; with 0.01 the weight
# followed the noise of 64 texts and erred more than without any making up.
RIDGE = 0.3


class OriginalInputs:
    """A run of the original model beside one that is being rounded, one linear after the other."""

    def __init__(
        self, program: Program, samples: Sequence[Sample], linears: Iterable[Node]
    ) -> None:
        original = program.clone()
        names = {node.name for node in linears}
        looked_at = [node for node in original.graph.nodes if node.name in names]
        self._lockstep = Lockstep(original, samples)
        self._steps = self._given_up_behind(original, looked_at)

    def rows(self, linear: Node) -> list[Tensor]:
        """What the original of a linear reads, in each batch; linears come in graph order."""
        node = next(node for node in self._steps if node.name == linear.name)
        source: Any = node.args[0]
        return self._lockstep.rows(source)

    def close(self) -> None:
        """End the run, and hold nothing of it any longer."""
        self._steps.close()

    def _given_up_behind(self, original: Program, looked_at: list[Node]) -> Generator[Node]:
        """The steps of the run; weights that none after them reads are held no longer."""
        last: dict[str, Node] = {}
        for node in original.nodes():
            last |= {str(s.target): node for s in node.all_input_nodes if s.op == "get_attr"}
        done: dict[Node, list[str]] = {}
        for name, node in last.items():
            done.setdefault(node, []).append(name)
        before: Node | None = None
        with contextlib.closing(self._lockstep.steps(looked_at)) as steps:
            for node in steps:
                for name in done.get(before, ()) if before is not None else ():
                    original.set_weight(name, torch.empty(0))
                before = node
                yield node


class InputChange:
    """How the inputs of linears have changed: (X - Y)^T Y (H + ridge mean(diag H) I)^-1, [in, in].

    Args:
        original, present: X and Y, batch by batch. A token that only the rounded model sends to an
            expert has zeros in X, and the outputs of the original weight are its aim.
        moments: H, the damped second moments of Y; damping adds to the ridge.
    """

    def __init__(
        self, original: Sequence[Tensor], present: Sequence[Tensor], moments: Tensor
    ) -> None:
        cross = torch.zeros_like(moments)
        for x, y in zip(original, present, strict=True):
            wide = y.float()
            change = (x.float() - wide).mul_(x.any(1, keepdim=True))
            cross += (change.T @ wide).double()
        self._factor: Tensor | None = None
        self._cross = cross
        if bool(cross.any()):
            ridged = moments.clone()
            ridged.diagonal().add_(RIDGE * moments.diagonal().mean())
            self._factor = torch.linalg.cholesky(ridged)

    def make_up(self, weight: Tensor) -> Tensor:
        """V of W; W itself where nothing has changed."""
        if self._factor is None:
            return weight
        wide = weight.double()
        change = torch.cholesky_solve((wide @ self._cross).T, self._factor).T
        return (wide + change).to(weight.dtype)
