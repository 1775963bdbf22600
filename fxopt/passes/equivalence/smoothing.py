"""Choose and apply per-channel scales at the inputs of linears.

    y = (x / s) (W diag(s))^T

Where dataflow proves it, 1/s is folded into what writes x; elsewhere it rides in front of the
linear, where the quantize operator takes it up.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.readers import Reader, read_elsewhere, readers
from fxopt.passes.quantization.weights import kind_of, weight_indices, weight_node
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
# Scales closer to one than this are no scales: a second run finds nothing to do.
UNCHANGED = 1e-3


@dataclass(frozen=True)
class Reading:
    """One activation of a site: the weights that read it, and where coordinates stand in it.

    Attributes:
        weights: names, [out, in] of linears and [E, out, in] of experts.
        channels: [size, copies] of the channels [in] that a factor of a coordinate scales.
    """

    reader: Reader
    weights: tuple[str, ...]
    channels: Tensor

    def spread(self, factors: Tensor) -> Tensor:
        """Factors [size] of the coordinates as scales per input channel [in]."""
        order = self.channels.flatten().argsort()
        return factors.repeat_interleave(self.channels.shape[1])[order]

    def gather(self, channels: Tensor) -> Tensor:
        """The largest of a statistic [in] over the channels that share a coordinate [size]."""
        return channels.double()[self.channels].amax(1)

    def columns(self, program: Program) -> list[Tensor]:
        """The weights, experts as one, [out, in] each."""
        return [program.weight(name).flatten(0, -2) for name in self.weights]

    def column_reach(self, program: Program) -> Tensor:
        """The largest |W| over all rows of all its weights, per input channel [in]."""
        reaches = [weight.double().abs().amax(0) for weight in self.columns(program)]
        return torch.stack(reaches).amax(0)


@dataclass(frozen=True)
class SmoothingSite:
    """Activations read by linears, and the symmetry through which one scale of them is folded.

    Without a symmetry it is one activation, of which each channel has a factor of its own.
    """

    readings: tuple[Reading, ...]
    symmetry: Symmetry | None
    inverse: bool = False  # whether weights are divided where the symmetry multiplies
    reason: str = ""  # why there is no symmetry

    @property
    def path(self) -> str:
        """The modules that read them."""
        return ", ".join(dict.fromkeys(reading.reader.path for reading in self.readings))

    def gather(self, statistics: Iterable[Tensor]) -> Tensor:
        """The largest of a statistic [in] of each activation, per coordinate [size]."""
        pairs = zip(self.readings, statistics, strict=True)
        return torch.stack([reading.gather(channels) for reading, channels in pairs]).amax(0)


def smoothing_sites(program: Program, fold: bool = True) -> list[SmoothingSite]:
    """Every activation that linears read, in graph order, with the symmetry that it can use.

    What shares a symmetry (the layers of ALBERT share all of theirs) is one site.
    """
    found, mixed = symmetries(program, Kind.SCALE), _of_experts(program)
    sites: list[SmoothingSite] = []
    places: dict[int, int] = {}  # where the site of a symmetry stands
    for reader in readers(program):
        site = _site(program, reader, found if fold else None, mixed)
        place = len(sites) if site.symmetry is None else places.get(id(site.symmetry), len(sites))
        if place == len(sites):
            if site.symmetry is not None:
                places[id(site.symmetry)] = place
            sites.append(site)
        elif site.inverse == sites[place].inverse:
            readings = (*sites[place].readings, *site.readings)
            sites[place] = replace(sites[place], readings=readings)
        else:
            reason = f"its scale is the inverse of that of {sites[place].path}"
            sites.append(_unfolded(program, reader, reason))
    return sites


def _of_experts(program: Program) -> set[str]:
    """The names of the weights of experts."""
    mixtures = [node for node in program.nodes() if kind_of(node) == "experts"]
    weights = (weight_node(node, index) for node in mixtures for index in weight_indices(node))
    return {str(weight.target) for weight in weights if weight is not None}


def _site(
    program: Program, reader: Reader, found: Symmetries | None, mixed: Collection[str]
) -> SmoothingSite:
    if found is None:
        return _unfolded(program, reader, "folding was not asked for")
    width = program.weight(reader.weights[0]).shape[1]
    names = set(reader.weights)
    for symmetry in found:
        edits = [edit for edit in symmetry.weights if edit.name in names and edit.axes == (1,)]
        whole = all(edit.positions.size == width for edit in edits)
        if {edit.name for edit in edits} == names and whole:
            columns = [edit for edit in symmetry.weights if edit.axes == (2,)]
            experts = [e.name for e in columns if e.name in mixed and e.positions.size == width]
            channels = torch.from_numpy(edits[0].positions).flatten(0, 1)
            reading = Reading(reader, (*reader.weights, *experts), channels)
            return SmoothingSite((reading,), symmetry, edits[0].inverse)
    known = [why for name in reader.weights if (why := found.reason(name, 1)) is not None]
    reason = known[0] if known else "only a part of its channels can change"
    return _unfolded(program, reader, reason)


def _unfolded(program: Program, reader: Reader, reason: str) -> SmoothingSite:
    channels = torch.arange(program.weight(reader.weights[0]).shape[1])[:, None]
    reading = Reading(reader, reader.weights, channels)
    return SmoothingSite((reading,), None, reason=reason)


def scale_site(program: Program, changes: Changes, site: SmoothingSite, scale: Tensor) -> None:
    """Divide activations by `scale` [size] and multiply the columns of their readers by it."""
    if bool(((scale - 1).abs() < UNCHANGED).all()):
        return
    if site.symmetry is not None:
        factors = scale.reshape(site.symmetry.blocks, -1)
        changes.apply(site.symmetry, 1 / factors if site.inverse else factors, "scale folded")
        return
    (reading,) = site.readings
    reason = read_elsewhere(program, reading.reader)
    if reason is not None:
        changes.refuse(site.path, reason)
        return
    _ride(program, changes, reading.reader, site.reason, scale)


def _ride(program: Program, changes: Changes, reader: Reader, reason: str, scale: Tensor) -> None:
    source, linears = reader.source, reader.linears
    for name in reader.weights:
        weight = program.weight(name)
        program.set_weight(name, (weight.double() * scale).to(weight.dtype))
    build = Builder(program, linears[0], "smoothing")
    value = (1 / scale).to(program.weight(reader.weights[0]).dtype)
    name = f"{module_path(linears[0])}.inverse_smoothing_scale".lstrip(".")
    smoothed = build.call(aten.mul.Tensor, source, build.new_weight(name, value))
    for linear in linears:
        linear.update_arg(0, smoothed)
    detail = f"scale rides in front of {reader.path}: {reason}"
    changes.sites.append(Site(module_path(linears[0]), detail, linears[0].name))
