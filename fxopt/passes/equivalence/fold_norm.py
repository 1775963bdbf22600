"""Fold the gain of a norm into the linears that read it, and centre layer norms into rms norms.

    linear(norm(x) g + b, W, c)  =  linear(norm(x), W diag(g), c + W b)
    layer_norm(x)  =  rms_norm(x)   where every writer of x has mean zero over its outputs

Shapes: x [..., d]; g, b [d]; W [n, d], columns times g; c [n].
Exactness: equal over the reals; each weight is rounded once.
Source: Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
    ICLR 2024, arXiv:2401.15024.
"""

import functools
from dataclasses import dataclass

import torch

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Edit, Symmetry, symmetries
from fxopt.analysis.transform import changed
from fxopt.ir.program import Level, Program, Site
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.centring import centre
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.norms import (
    Norm,
    fold_bias,
    group_by_gain,
    norms,
    read_by_norms_alone,
    reads_only_linear,
)


@register("fold-norm")
@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move the gains of norms into the linears behind them; on request turn layer norm into rms."""

    bias: bool = True
    centre: bool = False

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize",)
    before = ("quantize",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Fold every gain that only linears read; then biases, then centre."""
        changes = Changes(program)
        found = symmetries(program, Kind.SCALE)
        held = {edit.name: symmetry for symmetry in found for edit in symmetry.weights}
        alike = group_by_gain(norms(program))
        for gain, (norm, *others) in alike.items():
            if bool((norm.value == 1).all()):
                continue
            symmetry = held.get(gain)
            reason = _unfoldable([norm, *others], symmetry)
            if reason is None and symmetry is not None:
                _fold(program, changes, norm, symmetry)
                readers = ", ".join(e.name for e in _from_gain(norm, symmetry) if e.inverse)
                changes.sites.append(Site(norm.path, f"gain folded into {readers}"))
            else:
                changes.refuse(norm.path, found.reason(gain) or str(reason))
        if self.bias:
            for norm in norms(program):
                if fold_bias(program, norm):
                    changes.activations = None
                    changes.sites.append(Site(norm.path, "bias folded into the linears behind it"))
        if self.centre:
            centre(program, changes, self.name)
        return changes.result()


def _unfoldable(alike: list[Norm], symmetry: Symmetry | None) -> str | None:
    norm = alike[0]
    if symmetry is None:
        return "what reads it is not only linears with a stored weight"
    edits = _from_gain(norm, symmetry)
    gains = [edit for edit in edits if edit.name == norm.gain]
    others = [e for e in edits if not e.inverse and e.name not in (norm.gain, norm.shift)]
    readers = [edit for edit in edits if edit.inverse]
    if any(edit.axes[-1:] in ((), (0,)) for edit in readers):
        return f"no linear reads it: {', '.join(edit.name for edit in readers)} would take it up"
    if others or len(gains) != 1 or gains[0].positions.size != norm.value.numel():
        return f"its gain is tied to {', '.join(e.name for e in others) or 'other gains'}"
    negative = int((norm.value < 0).sum())
    plain = read_by_norms_alone(alike) and all(reads_only_linear(n.node) for n in alike)
    if negative and not plain:
        return f"{negative} of its gains are negative and something nonlinear lies behind it"
    zero = bool((norm.value == 0).any())
    if zero and norm.shift is not None:
        return "some of its gains are zero and it has a bias"
    if zero and any(edit.role == "input" for edit in symmetry.edits):
        return "some of its gains are zero and a cache would be divided by them"
    shared = norm.value[torch.from_numpy(gains[0].positions)]
    if not bool((shared == shared[..., :1]).all()):
        return "channels that have to change alike have different gains"
    return None


def _from_gain(norm: Norm, symmetry: Symmetry) -> list[Edit]:
    """The weights of the axis, with directions counted from the norm's gain."""
    turned = _is_turned(norm, symmetry)
    return [edit.turned() if turned else edit for edit in symmetry.weights]


def _is_turned(norm: Norm, symmetry: Symmetry) -> bool:
    return next(edit for edit in symmetry.weights if edit.name == norm.gain).inverse


def _fold(program: Program, changes: Changes, norm: Norm, symmetry: Symmetry) -> None:
    """The gain becomes one; what it multiplied, a cache included, takes it up."""
    edits = _from_gain(norm, symmetry)
    gain = next(edit for edit in edits if edit.name == norm.gain)
    factor = norm.value[torch.from_numpy(gain.positions)][..., 0]
    for edit in edits:
        value = program.weight(edit.name)
        if edit is gain:
            new = torch.full_like(value, 1.0 - edit.offset)
        else:
            new = changed(value, edit.turned(), Kind.SCALE, factor)
        program.set_weight(edit.name, new)
    read = [edit.turned() for edit in edits if edit is not gain]
    changes.turn_inputs(read, Kind.SCALE, factor)
    for edit in symmetry.edits:
        if edit.role == "input":
            towards = edit.turned() if _is_turned(norm, symmetry) else edit
            change = functools.partial(
                changed, edit=towards.turned(), kind=Kind.SCALE, transform=factor
            )
            changes.follow(edit.name, change)
