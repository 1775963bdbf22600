"""Choose and apply per-channel scales at the inputs of linears.

    y = (x / s) (W diag(s))^T

Where dataflow proves it, 1/s is folded into what writes x; elsewhere it rides in front of the
linear, where the quantize operator takes it up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Edit, Symmetries, Symmetry, symmetries
from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.readers import Reader, read_elsewhere, readers
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
# Scales closer to one than this are no scales: a second run finds nothing to do.
UNCHANGED = 1e-3


@dataclass(frozen=True)
class SmoothingSite:
    """One activation read by linears, and the symmetry through which a scale can be folded."""

    reader: Reader
    symmetry: Symmetry | None
    edits: tuple[Edit, ...]  # those of its weights' input axes
    reason: str = ""  # why there is no symmetry

    def spread(self, factors: Tensor) -> Tensor:
        """Factors [size] of the symmetry's coordinates as scales per input channel [in]."""
        positions = torch.from_numpy(self.edits[0].positions)[0]
        order = positions.flatten().argsort()
        return factors.repeat_interleave(positions.shape[1])[order]

    def gather(self, channels: Tensor) -> Tensor:
        """The largest of a statistic [in] over the channels that share a coordinate [size]."""
        positions = torch.from_numpy(self.edits[0].positions)[0]
        return channels.double()[positions].amax(1)


def smoothing_sites(program: Program, fold: bool = True) -> list[SmoothingSite]:
    """Every activation that linears read, in graph order, with the symmetry that it can use."""
    found = symmetries(program, Kind.SCALE)
    return [_site(program, reader, found, fold) for reader in readers(program)]


def _site(program: Program, reader: Reader, found: Symmetries, fold: bool) -> SmoothingSite:
    width = program.weight(reader.weights[0]).shape[1]
    names = set(reader.weights)
    reason = "folding was not asked for"
    for symmetry in found if fold else ():
        edits = tuple(edit for edit in symmetry.weights if edit.name in names and edit.axes == (1,))
        whole = all(edit.positions.size == width for edit in edits)
        if {edit.name for edit in edits} == names and whole:
            return SmoothingSite(reader, symmetry, edits)
    if fold:
        known = [why for name in reader.weights if (why := found.reason(name, 1)) is not None]
        reason = known[0] if known else "only a part of its channels can change"
    return SmoothingSite(reader, None, (), reason)


def scale_site(program: Program, changes: Changes, site: SmoothingSite, scale: Tensor) -> None:
    """Divide an activation by `scale` [in] and multiply the columns of its readers by it."""
    if bool(((scale - 1).abs() < UNCHANGED).all()):
        return
    if site.symmetry is not None:
        inverse = site.edits[0].inverse
        positions = torch.from_numpy(site.edits[0].positions)
        factors = scale[positions][..., 0]
        changes.apply(site.symmetry, 1 / factors if inverse else factors, "scale folded")
        return
    reason = read_elsewhere(program, site.reader)
    if reason is not None:
        changes.refuse(site.reader.path, reason)
        return
    _ride(program, changes, site, scale)


def _ride(program: Program, changes: Changes, site: SmoothingSite, scale: Tensor) -> None:
    source, linears = site.reader.source, site.reader.linears
    for name in site.reader.weights:
        weight = program.weight(name)
        program.set_weight(name, (weight.double() * scale).to(weight.dtype))
    build = Builder(program, linears[0], "smoothing")
    value = (1 / scale).to(program.weight(site.reader.weights[0]).dtype)
    name = f"{module_path(linears[0])}.inverse_smoothing_scale".lstrip(".")
    smoothed = build.call(aten.mul.Tensor, source, build.new_weight(name, value))
    for linear in linears:
        linear.update_arg(0, smoothed)
    detail = f"scale rides in front of {site.reader.path}: {site.reason}"
    changes.sites.append(Site(module_path(linears[0]), detail, linears[0].name))
