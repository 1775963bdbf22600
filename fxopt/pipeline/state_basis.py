"""Compare programs whose caches are written in different bases.

A cache is state, not output. A pass that changes its basis says how a cache in the old one is
brought to the new one; outputs that go on from such an input are compared in the new basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.ir.program import Program
from fxopt.ir.signature import TensorSpec
from fxopt.passes.base import PassResult


@dataclass(frozen=True)
class StateBasis:
    """The caches of the program before a pass, in the basis of the program after it."""

    before: Program
    result: PassResult

    def inputs(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the program before, as the program after takes them."""
        return self._moved(self._names(), values)

    def outputs(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the program before, as the program after gives them."""
        cache = self.before.signature.cache
        if cache is None or not self.result.state:
            return list(values)
        names = self._names()[-cache.count :]
        return [*values[: -cache.count], *self._moved(names, values[-cache.count :])]

    def _names(self) -> list[str]:
        return [node.name for node in self.before.graph.nodes if node.op == "placeholder"]

    def _moved(self, names: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
        moved: list[Tensor] = []
        for name, value in zip(names, values, strict=True):
            change = self.result.state.get(name)
            found = value if change is None else change(value)
            moved += [found] if isinstance(found, Tensor) else found
        return moved


def fitted(program: Program, values: Sequence[Tensor]) -> list[Tensor]:
    """Inputs with dense caches as a program takes them, which passes may have changed.

    They are cut to the heads and channels that are left, for any state serves to compare, and held
    in the program's form. Inputs that are in its form already stay as they are.
    """
    signature = program.signature
    cache = signature.cache
    others = len(signature.inputs) - (cache.count if cache else 0)
    if cache is None or len(values) != others + 2 * cache.layers:
        return list(values)
    states = zip(cache.states, cache.split(signature.inputs), values[others:], strict=True)
    dense = [_cut(value, specs[form.dense_part]) for form, specs, value in states]
    return signature.hold([*values[:others], *dense])


def _cut(value: Tensor, spec: TensorSpec) -> Tensor:
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int) and size < value.shape[axis]:
            value = value.narrow(axis, 0, size)
    return value
