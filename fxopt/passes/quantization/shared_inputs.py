"""What a weight is shown where several linears read it: the inputs of all, in the original model.

    H = sum over linears l of X_l^T X_l

Shapes: X_l [tokens, in] is what the original model gives a linear. Rounding for the first of them
    alone would harm the others, and what these read then is known only once it is rounded.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxopt.analysis.lockstep import Lockstep
from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program, module_path
from fxopt.passes.quantization.compensation import second_moments
from fxopt.passes.quantization.weights import kind_of, weight_name


class SharedInputs:
    """Second moments of the inputs of weights that more than one linear reads."""

    def __init__(
        self, program: Program, samples: Sequence[Sample], rounded: Sequence[Node]
    ) -> None:
        linears = [node for node in rounded if kind_of(node) == "linear"]
        self.calls = Counter(weight_name(node) for node in linears)
        self._moments: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        shared = [node for node in linears if self.calls[weight_name(node)] > 1]
        if shared:
            lockstep = Lockstep(program, samples)
            lockstep.run(partial(self._visit, lockstep), shared)

    def take(self, name: str) -> tuple[Tensor, int] | None:
        """The moments [in, in], held no longer, and the tokens; None where one linear reads it."""
        moments = self._moments.pop(name, None)
        return None if moments is None else (moments, self._tokens[name])

    def _visit(self, lockstep: Lockstep, node: Node) -> None:
        if kind_of(node) != "linear" or self.calls[weight_name(node)] < 2:
            return
        source: Any = node.args[0]
        name, path = weight_name(node), module_path(node) or node.name
        try:
            rows = lockstep.rows(source)
            moments = second_moments(rows)
        except CalibrationError as error:
            raise CalibrationError(f"gptq of {path}: {error}") from error
        if sum(len(part) for part in rows):
            self._moments[name] = self._moments.get(name, 0) + moments
            self._tokens[name] += sum(int(part.any(1).sum()) for part in rows)
