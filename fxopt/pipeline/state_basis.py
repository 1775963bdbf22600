"""Compare programs whose caches are written in different bases.

A cache is state, not output. A pass that changes its basis says how a cache in the old one is
brought to the new one; outputs that go on from such an input are compared in the new basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.ir.program import Program
from fxopt.passes.base import PassResult


@dataclass(frozen=True)
class StateBasis:
    """The caches of the program before a pass, in the basis of the program after it."""

    before: Program
    result: PassResult

    def inputs(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the program before, as the program after takes them."""
        names = [node.name for node in self.before.graph.nodes if node.op == "placeholder"]
        state = self.result.state
        return [
            state[name](value) if name in state else value
            for name, value in zip(names, values, strict=True)
        ]

    def outputs(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the program before, as the program after gives them."""
        cache = self.before.signature.cache
        if cache is None or not self.result.state:
            return list(values)
        count = 2 * cache.layers
        names = [node.name for node in self.before.graph.nodes if node.op == "placeholder"][-count:]
        state = self.result.state
        carried = [
            state[name](value) if name in state else value
            for name, value in zip(names, values[-count:], strict=True)
        ]
        return [*values[:-count], *carried]


def fitted(program: Program, values: Sequence[Tensor]) -> list[Tensor]:
    """Inputs with caches cut to the sizes that a program takes: any state serves to compare."""
    cache = program.signature.cache
    result = list(values)
    for index in range(len(result) - (2 * cache.layers if cache else 0), len(result)):
        for axis, size in enumerate(program.signature.inputs[index].shape):
            if isinstance(size, int) and size < result[index].shape[axis]:
                result[index] = result[index].narrow(axis, 0, size)
    return result
