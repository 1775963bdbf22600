"""How much each coordinate of a hidden axis matters.

    magnitude   I_c = sqrt(sum of w^2 over all weights that hold c)
    activation  I_c mean|x_c|, the mean over the linears that read the axis

Shapes: w runs over all axes of a weight but that of c; x_c over the calibration tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxopt.analysis.symmetry import Symmetry
from fxopt.errors import AnalysisError
from fxopt.ir.program import Program
from fxopt.passes.equivalence.readers import readers


def importance_of(
    program: Program, symmetry: Symmetry, means: Mapping[str, Tensor] | None
) -> Tensor:
    """Scores [blocks, size]; `means` holds the mean |x| of what linears read, by node name.

    Raises:
        AnalysisError: activations were asked for, and no linear was seen to read the axis.
    """
    total = torch.zeros(symmetry.blocks, symmetry.size, dtype=torch.float64)
    for edit in symmetry.weights:
        leading = list(range(len(edit.axes)))
        value = program.weight(edit.name).double().movedim(edit.axes, leading)
        squares = value.flatten(0, len(edit.axes) - 1).square()
        held = squares.flatten(1).sum(1) if squares.dim() > 1 else squares
        total += held[torch.from_numpy(edit.positions)].sum(2)
    magnitude = total.sqrt()
    return magnitude if means is None else magnitude * _activation(program, symmetry, means)


def _activation(program: Program, symmetry: Symmetry, means: Mapping[str, Tensor]) -> Tensor:
    places = {edit.name: edit.positions for edit in symmetry.weights if edit.axes == (1,)}
    seen: list[Tensor] = []
    for reader in readers(program):
        mean = means.get(reader.source.name)
        name = next((name for name in reader.weights if name in places), None)
        if name is None or mean is None or mean.numel() != program.weight(name).shape[1]:
            continue
        seen.append(mean.double()[torch.from_numpy(places[name])].mean(2))
    if not seen:
        raise AnalysisError("no linear was seen to read it, so that its activation is not known")
    return torch.stack(seen).mean(0)
