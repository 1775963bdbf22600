"""Per-embedding-group quantization: sort the channels that linears read by their range.

    r_j = max(max x_j, 0) - min(min x_j, 0),   pi = argsort r,   y = x[pi] W[:, pi]^T + b

Shapes: x [..., d], over all calibration tokens; r and pi [d]; W [out, d]. K groups of d / K
    channels that follow each other then differ little in range, and `quantize` with granularity
    "embedding_group" gives each one (scale, zero point). With `symmetric`, as that will round,
    r_j = 2 max |x_j|.
    Activations whose order stands in the same weights, as in the layers of ALBERT, have one order,
    by the range of a channel over all of them.
Exactness: equal over the reals; every number keeps its value. The order is folded into what writes
    a feed-forward's hidden axis; elsewhere x is gathered in front of its linears, whose columns are
    permuted once. Deviations: every linear's input is sorted, not those of the FFN alone; the
    range holds zero, as that of a scale does; channels that reach far up and far down are put
    into different groups where that makes the ranges smaller (see channel_groups), which only
    asymmetric grids gain by.
Source: Bondarenko et al., Understanding and Overcoming the Challenges of Efficient Transformer
    Quantization, EMNLP 2021, arXiv:2109.12948.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.calibration import linear_inputs
from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, Site, module_path
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.readers import Reader, read_elsewhere, readers
from fxopt.passes.quantization.channel_groups import group_ranges, least_ranges
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
# Groups whose ranges are together this close to those that were found stay as they are.
_NEAR = 1.001


@register("peg")
@dataclass(frozen=True)
class Peg(Pass):
    """Sort the channels that linears read by range, so that groups of them can share a scale."""

    groups: int = 6
    fold: bool = True
    symmetric: bool = True

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "rotate", "equalize", "smoothquant", "permute-ffn", "permute-residual")
    before = ("quantize",)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"groups {self.groups} is not a positive number.")

    def needs(self) -> tuple[Calibration, ...]:
        """The range of every channel that a linear reads."""
        return (Calibration("minimum"), Calibration("maximum"))

    def observed(self, program: Program) -> list[Node]:
        """The activations that linears read."""
        return linear_inputs(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Sort every activation whose groups gain by it."""
        changes = Changes(program)
        found = symmetries(program, Kind.PERMUTE)
        for symmetry, sharing in self._by_symmetry(program, found):
            reader = sharing[0]
            ends = [self._ends(each, context) for each in sharing]
            width = len(ends[0][0])
            if width % self.groups:
                reason = f"{self.groups} groups do not divide its {width} inputs"
                changes.refuse(reader.path, reason)
                continue
            low = torch.stack([low for low, _ in ends]).amin(0)
            high = torch.stack([high for _, high in ends]).amax(0)
            order = least_ranges(low, high, self.groups)
            before, after = self._cost(ends), self._cost([(a[order], b[order]) for a, b in ends])
            if before <= _NEAR * after:
                continue
            context.progress(reader.path)
            gain = f"group ranges {after / before:.2f}x"
            if symmetry is not None:
                detail = f"order of {reader.path} folded, {gain}"
                changes.apply(symmetry, _of_coordinates(reader, symmetry, order), detail)
            else:
                why = _reason(reader, found) if self.fold else "folding was not asked for"
                _gather(program, changes, reader, order, f"{gain}; not folded: {why}")
        return changes.result()

    def _by_symmetry(
        self, program: Program, found: Symmetries
    ) -> list[tuple[Symmetry | None, list[Reader]]]:
        """Activations whose order is stored in the same weights, which have one order."""
        sites: list[tuple[Symmetry | None, list[Reader]]] = []
        for reader in readers(program):
            width = program.weight(reader.weights[0]).shape[1]
            symmetry = _own_symmetry(reader, found, width) if self.fold else None
            known = [site for site in sites if symmetry is not None and site[0] is symmetry]
            if known:
                known[0][1].append(reader)
            else:
                sites.append((symmetry, [reader]))
        return sites

    def _cost(self, ends: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The root mean square of the groups' ranges; the error of rounding is in proportion."""
        ranges = torch.stack([group_ranges(low, high, self.groups) for low, high in ends])
        return float(ranges.square().mean().sqrt())

    def _ends(self, reader: Reader, context: Context) -> tuple[Tensor, Tensor]:
        """What the range of each channel must reach, low <= 0 <= high."""
        name = reader.source.name
        if name not in context.statistics["minimum"]:
            raise CalibrationError(
                f"the input of {reader.path} was never reached by the calibration data. Pass "
                "calibration data that uses this part of the model."
            )
        low = context.statistics["minimum"][name].double().clamp(max=0)
        high = context.statistics["maximum"][name].double().clamp(min=0)
        reach = torch.maximum(-low, high)
        return (-reach, reach) if self.symmetric else (low, high)


def _own_symmetry(reader: Reader, found: Symmetries, width: int) -> Symmetry | None:
    """The symmetry of an axis that is stored in weights alone and read by these weights alone."""
    for symmetry in found:
        read = {edit.name for edit in symmetry.weights if edit.axes == (1,)}
        whole = (symmetry.blocks, symmetry.size) == (1, width)
        stored = len(symmetry.weights) == len(symmetry.edits)
        if symmetry.role == "hidden" and whole and stored and read == set(reader.weights):
            return symmetry
    return None


def _of_coordinates(reader: Reader, symmetry: Symmetry, order: Tensor) -> Tensor:
    """The order of the symmetry's coordinates [1, size] that puts its channels in `order`."""
    edit = next(edit for edit in symmetry.weights if edit.name in reader.weights)
    places = torch.from_numpy(edit.positions)[0, :, 0]
    return places.argsort()[order[places]][None]


def _reason(reader: Reader, found: Symmetries) -> str:
    known = [why for name in reader.weights if (why := found.reason(name, 1)) is not None]
    return known[0] if known else "other linears share its axis, or it falls into heads"


def _gather(program: Program, changes: Changes, reader: Reader, order: Tensor, detail: str) -> None:
    reason = read_elsewhere(program, reader)
    if reason is not None:
        changes.refuse(reader.path, reason)
        return
    for name in reader.weights:
        program.set_weight(name, program.weight(name)[:, order].contiguous())
    first = reader.linears[0]
    build = Builder(program, first, "peg")
    held = build.new_weight(f"{module_path(first)}.input_order".lstrip("."), order)
    gathered = build.call(aten.index_select.default, reader.source, -1, held)
    for linear in reader.linears:
        linear.update_arg(0, gathered)
    changes.sites.append(
        Site(module_path(first), f"inputs of {reader.path} gathered, {detail}", first.name)
    )
