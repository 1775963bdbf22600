"""Subtract from all keys what they have in common, which softmax does not see.

    softmax(q (K - 1 c^T)^T) = softmax(q K^T - (q c) 1^T) = softmax(q K^T),    c = E[k]

Shapes: K [B, Hkv, T, h], behind rotary embedding where there is one; c [1, Hkv, 1, h], the mean
    over the real tokens of the calibration data.
Exactness: equal over the reals. A cache holds centred keys, which are smaller, so that formats
    with a relative error (fp8) round them better; without a cache nothing is gained by it. Where
    scores are capped or softmax has a sink, a constant would be seen, and nothing is changed.
Source: Zhang et al., SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference
    Acceleration, ICLR 2025, arXiv:2410.02367. Deviation: there c is the mean over the tokens of a
    call; here it is fixed, so that the keys of all calls go together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import Level, Program, Site, module_path, shape_of
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.attended_keys import (
    READ_ELSEWHERE,
    AttendedKeys,
    attended_keys,
    replace_new_keys,
)
from fxopt.passes.equivalence.changes import Changes
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import argument
from fxopt.rewrite.sizes import fixed

aten = torch.ops.aten
# A mean this small beside the keys is none: a second run finds nothing to do.
_NEGLIGIBLE = 1e-3


@register("centre-keys")
@dataclass(frozen=True)
class CentreKeys(Pass):
    """Subtract the mean key of each head from all keys, so that a cache rounds smaller numbers."""

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate")
    before = ("quantize-cache",)

    def needs(self) -> tuple[Calibration, ...]:
        """The mean of every key, and how large keys are beside it."""
        return (Calibration("mean"), Calibration("mean_abs"))

    def observed(self, program: Program) -> list[Node]:
        """The keys of the tokens of a call."""
        return [keys.new for keys in attended_keys(program) if keys.new is not None]

    def run(self, program: Program, context: Context) -> PassResult:
        """Centre the keys of every attention that lets them be centred."""
        changes = Changes(program)
        for keys in attended_keys(program):
            path = module_path(keys.attentions[0])
            reason = _refusal(keys, context)
            if reason is not None:
                changes.refuse(path or keys.read.name, reason)
                continue
            assert keys.new is not None  # noqa: S101 - _refusal looked
            context.progress(path)
            mean, size = (context.statistics[kind][keys.new.name] for kind in ("mean", "mean_abs"))
            if float(mean.abs().max()) <= _NEGLIGIBLE * float(size.max()):
                continue
            heads, width = shape_of(keys.new)[1], shape_of(keys.new)[3]
            held = mean.reshape(1, heads, 1, width).to(keys.new.meta["val"].dtype)
            build = Builder(program, keys.attentions[0], self.name)
            shift = build.new_weight(f"{path}.mean_key".lstrip("."), held)
            centred = replace_new_keys(program, keys, self.name, aten.sub.Tensor, shift)
            if keys.past is not None:
                changes.follow(keys.past.name, _shifted(held))
            share = float(mean.square().mean().sqrt() / size.square().mean().sqrt())
            detail = f"mean of {share:.2f}x the size of keys subtracted"
            changes.sites.append(Site(path, detail, centred.name))
        return changes.result()


def _refusal(keys: AttendedKeys, context: Context) -> str | None:
    for node in keys.attentions:
        if argument(node, "softcap") is not None:
            return "its scores are capped, so that a constant in all of them is not without effect"
        if argument(node, "sinks") is not None:
            return "its softmax has a sink, beside which a constant in all scores is seen"
    if keys.new is None:
        return READ_ELSEWHERE
    shape = shape_of(keys.new)
    heads, width = fixed(shape[1]), fixed(shape[3])
    if heads is None or width is None:
        return f"its keys of shape {list(shape)} have heads or channels that vary"
    mean = context.statistics["mean"].get(keys.new.name)
    if mean is None:
        return "it was never reached by the calibration data"
    if mean.numel() != heads * width:
        return "the number of tokens was fixed at capture, so that heads cannot be told from them"
    return None


def _shifted(mean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value - mean.to(value.device)
