"""Inputs that go on from a long cache, for passes whose cost shows only when a cache is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.analysis.execution import run
from fxopt.capture.inputs import PAST, SEQUENCE
from fxopt.ir.program import Program
from fxopt.ir.signature import CacheSpec, TensorSpec

_TOTAL = f"{PAST}_{SEQUENCE}"


def reading_on(
    program: Program, inputs: Sequence[Sequence[Tensor]], tokens: int
) -> list[list[Tensor]]:
    """The same inputs behind a cache of `tokens` tokens or more.

    Each is cut in two: the program reads the first half, and what is compared is the second half,
    which reads what the first left in the cache. Where that is too short it stands there several
    times over: any state serves to compare, and attention over copies of real keys weighs them as
    before. A cache that an input came with is left out, for it holds random numbers, unless there
    is nothing else.
    """
    cache = program.signature.cache
    if cache is None or any(form.dtype for form in cache.states):
        return [list(values) for values in inputs]
    others = len(program.signature.inputs) - cache.count
    specs = program.signature.inputs[:others]
    empty = [_without_past(cache, specs, v) for v in inputs if _sequence(specs, v) > 1]
    halves = [_second_half(program, specs, values) for values in empty]
    return [_repeated(cache, specs, values, tokens) for values in halves or inputs]


def _sequence(specs: Sequence[TensorSpec], values: Sequence[Tensor]) -> int:
    sizes = (_size(spec, value, SEQUENCE) for spec, value in zip(specs, values, strict=False))
    return max(sizes, default=0)


def _size(spec: TensorSpec, value: Tensor, dimension: str) -> int:
    return value.shape[spec.shape.index(dimension)] if dimension in spec.shape else 0


def _without_past(
    cache: CacheSpec, specs: Sequence[TensorSpec], values: Sequence[Tensor]
) -> list[Tensor]:
    length = cache.length(values)
    kept = [_cut(s, v, 0, None, (length, None)) for s, v in zip(specs, values, strict=False)]
    return [*kept, *(value[:, :, :0] for value in values[len(specs) :])]


def _second_half(
    program: Program, specs: Sequence[TensorSpec], values: Sequence[Tensor]
) -> list[Tensor]:
    middle = _sequence(specs, values) // 2
    first = [_cut(s, v, 0, middle, (0, middle)) for s, v in zip(specs, values, strict=False)]
    present = run(program, [*first, *values[len(specs) :]])
    second = [_cut(s, v, middle, None, (0, None)) for s, v in zip(specs, values, strict=False)]
    return [*second, *present[len(present) - (len(values) - len(specs)) :]]


def _cut(
    spec: TensorSpec, value: Tensor, start: int, end: int | None, total: tuple[int, int | None]
) -> Tensor:
    """New tokens from `start` to `end`, and a span of what counts old and new ones."""
    for axis, dimension in enumerate(spec.shape):
        if dimension in (SEQUENCE, _TOTAL):
            span = slice(start, end) if dimension == SEQUENCE else slice(*total)
            value = value.movedim(axis, 0)[span].movedim(0, axis)
    return value.contiguous()


def _repeated(
    cache: CacheSpec, specs: Sequence[TensorSpec], values: Sequence[Tensor], tokens: int
) -> list[Tensor]:
    length = cache.length(values)
    times = -(-tokens // length) if length else 1
    longer: list[Tensor] = []
    for spec, value in zip(specs, values, strict=False):
        if _TOTAL in spec.shape:
            axis = spec.shape.index(_TOTAL)
            old, new = value.narrow(axis, 0, length), value
            value = torch.cat([*[old] * (times - 1), new], axis)
        longer.append(value)
    return [*longer, *(torch.cat([value] * times, 2) for value in values[len(specs) :])]
