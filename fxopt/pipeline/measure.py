"""How far two programs are apart: SQNR, relative error and, for logits, KL and agreement."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import fitting
from fxopt.analysis.execution import promote, run
from fxopt.analysis.output_error import divergence, is_logits
from fxopt.ir.program import Program
from fxopt.passes.base import PassResult

Inputs = Sequence[Tensor]
_SLAB_ELEMENTS = 1 << 20


@dataclass
class Measurement:
    """How far outputs moved: over all outputs, and for logits in the words of their users.

    `floating` says whether any output could be measured in decibels at all. `top1` is the share
    of equal choices, the smallest over the outputs: of the largest logits, and of the entries of
    outputs that are integers.
    """

    sqnr_db: float = math.inf
    relative_error: float = 0.0
    worst_output: str = ""
    kl: float | None = None
    top1: float | None = None
    outputs: dict[str, float] = field(default_factory=dict[str, float])
    floating: bool = False
    reshaped: str = ""  # which output has another shape, where values decide on it

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "sqnr_db": _finite(self.sqnr_db),
            "relative_error": self.relative_error,
            "worst_output": self.worst_output,
            "kl": self.kl,
            "top1": self.top1,
            "outputs": {name: _finite(db) for name, db in self.outputs.items()},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rms_error(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(b) over the finite entries; inf where the others are not the same."""
    if b.numel() == 0:
        return 0.0
    signal, noise, count = 0.0, 0.0, 0
    for x, y in _slabs(a, b):
        finite = torch.isfinite(y)
        if not same_where_not_finite(x, y, finite):
            return math.inf
        signal += float(torch.where(finite, y, 0.0).square().sum())
        noise += float(torch.where(finite, x - y, 0.0).square().sum())
        count += y.numel()
    return math.sqrt(noise / count) / max(math.sqrt(signal / count), 1e-30)


def max_error(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| / rms(b); integers, infinities and NaN must be equal."""
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return math.inf
    a, b = real_parts(a), real_parts(b)
    if b.numel() == 0:
        return 0.0
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = torch.isfinite(b)
    if not same_where_not_finite(a, b, finite):
        return math.inf
    scale = float(torch.where(finite, b, 0.0).square().mean().sqrt())
    return float(torch.where(finite, a - b, 0.0).abs().max()) / max(scale, 1e-30)


def real_parts(value: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, which differ and fail one by one."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def same_where_not_finite(a: Tensor, b: Tensor, finite: Tensor) -> bool:
    """Whether `a` is finite where `b` is, and elsewhere the same infinity or NaN."""
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    return bool((finite | (a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def measure(
    before: Program,
    after: Program,
    inputs: Sequence[Inputs],
    moved: Callable[[Inputs], Inputs] = list,
) -> Measurement:
    """SQNR, relative error and, for logits and choices, KL and top-1 agreement over all inputs.

    SQNR = 10 log10(sum y^2 / sum (y - y')^2), the smallest over the outputs that are not state.
    `moved` makes the inputs of the program after out of those before: caches may differ.
    """
    specs = before.signature.outputs
    count = len(specs) - (before.signature.cache.count if before.signature.cache else 0)
    signal, noise = [0.0] * count, [0.0] * count
    kls: list[Tensor] = []
    agreements: dict[int, list[Tensor]] = {}
    reshaped = ""
    for sample in inputs:
        with fitting(sample):
            old = run(before, sample)[:count]
        new = run(after, moved(sample))[:count]
        for index in range(count):
            if old[index].shape != new[index].shape:
                shapes = [list(value.shape) for value in (old[index], new[index])]
                reshaped = f"{specs[index].name!r} from {shapes[0]} to {shapes[1]}"
                noise[index] = math.inf
                continue
            for a, b in _slabs(old[index], new[index]):
                if not a.is_floating_point():
                    agreements.setdefault(index, []).append(_agreement(a, b))
                    continue
                finite = torch.isfinite(a)
                if not same_where_not_finite(b, a, finite):
                    noise[index] = math.inf
                    break
                signal[index] += float(torch.where(finite, a, 0.0).square().sum())
                noise[index] += float(torch.where(finite, a - b, 0.0).square().sum())
                if is_logits(specs[index]) and old[index].dim() >= 2:
                    kls.append(divergence(a, b).flatten())
                    same = _agreement(a.argmax(-1), b.argmax(-1))
                    agreements.setdefault(index, []).append(same)
        del old, new  # before those of the next sample are there as well
    outputs = {
        specs[i].name: _decibels(signal[i], noise[i])
        for i in range(count)
        if signal[i] > 0 or noise[i] > 0
    }
    worst = min(outputs, key=lambda name: outputs[name]) if outputs else ""
    decibels = outputs.get(worst, math.inf)
    return Measurement(
        sqnr_db=decibels,
        relative_error=10 ** (-decibels / 20),
        worst_output=worst,
        kl=float(torch.cat(kls).mean()) if kls else None,
        top1=min((float(torch.cat(same).mean()) for same in agreements.values()), default=None),
        outputs=outputs,
        floating=any(
            spec.dtype.is_floating_point or spec.dtype.is_complex for spec in specs[:count]
        ),
        reshaped=reshaped,
    )


def _slabs(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two outputs in float64, some rows at a time: logits of many tokens exceed the model."""
    if old.shape != new.shape or old.dim() < 2 or old.numel() <= _SLAB_ELEMENTS:
        yield real_parts(promote(old)), real_parts(promote(new))
        return
    rows = max(1, _SLAB_ELEMENTS // old.shape[-1])
    slabs = (value.reshape(-1, value.shape[-1]).split(rows) for value in (old, new))
    for a, b in zip(*slabs, strict=True):
        yield real_parts(promote(a)), real_parts(promote(b))


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """One for each entry that is equal, zero for each that is not; a single zero if none fits."""
    return (a == b).double().flatten() if a.shape == b.shape else torch.zeros(1).double()


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def layer_decibels(
    before: Program, after: Program, inputs: tuple[Inputs, Inputs], result: PassResult
) -> dict[str, float | None]:
    """SQNR at each site's own output, errors of the sites before it included, by module path."""
    paths = {site.node: site.path or site.node for site in result.sites if site.node}
    seen: dict[str, Tensor] = {}
    decibels: dict[str, float | None] = {}

    def remember(node: Node, value: Any) -> None:
        if node.name in paths and isinstance(value, Tensor):
            seen[node.name] = value

    def compare(node: Node, value: Any) -> None:
        old = seen.pop(node.name, None)
        if old is None or not isinstance(value, Tensor) or old.shape != value.shape:
            return
        error = rms_error(value, old)
        known = 0 < error < math.inf
        decibels[paths[node.name]] = -20 * math.log10(error) if known else None

    run(before, inputs[0], remember)
    run(after, inputs[1], compare)
    return decibels
