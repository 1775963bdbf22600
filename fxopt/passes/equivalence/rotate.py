"""Rotate hidden axes so that no channel stands out, and rounding costs less.

    R1  residual stream   x <- x Q,    W <- W Q (readers),  W <- Q^T W, b <- Q^T b (writers)
    R2  values, per head  v_h <- v_h R,   Wo_h <- Wo_h R
    R3  queries, keys     q <- q H, k <- k H at run time, behind rotary embedding
    R4  hidden units      x <- x H at run time,   W <- W H

Shapes: Q [d, d] for the whole stream; R [D, D] for each kv head; H of the size of the axis.
Exactness: equal over the reals; stored weights are rounded once, R3 and R4 add an operator.
Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024,
    arXiv:2404.00456; Liu et al., SpinQuant: LLM Quantization with Learned Rotations, ICLR 2025,
    arXiv:2405.16406 (the names R1 to R4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.ir.hadamard import rotation_matrix
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.online_rotation import rotate_keys, rotate_remaining

ROLES = {"residual": "R1", "value": "R2"}


@register("rotate")
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate the residual stream and the heads' values, and what is left at run time.

    Attributes:
        residual, values: R1 and R2, which are folded into weights.
        online: R4, an operator in front of every linear whose input is not rotated by weights.
        keys: R3, an operator on queries and keys; of use when the cache is rounded.
        seed: of the random signs.
    """

    residual: bool = True
    values: bool = True
    online: bool = True
    keys: bool = False
    seed: int = 0

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize", "untie", "fold-norm")
    before = ("quantize", "smoothquant", "equalize")

    def run(self, program: Program, context: Context) -> PassResult:
        """Rotate once; a program that is rotated already stays as it is."""
        changes = Changes(program)
        if any(record.name == self.name for record in program.history):
            changes.refuse("(model)", "it is rotated already; a second rotation gains nothing")
            return changes.result()
        wanted = {"residual": self.residual, "value": self.values}
        found = Symmetries(Kind.ROTATE, Unit.CHANNEL)
        if any(wanted.values()):
            found = symmetries(program, Kind.ROTATE)
        rotated: set[tuple[str, int]] = set()
        # Numbered among themselves: an axis that is not rotated changes no other's signs.
        chosen = [symmetry for symmetry in found if wanted.get(symmetry.role, False)]
        for number, symmetry in enumerate(chosen):
            context.progress(symmetry.path)
            detail = f"{ROLES[symmetry.role]}, {symmetry.blocks} x {symmetry.size}"
            changes.apply(symmetry, _matrices(symmetry, self.seed + number), detail)
            rotated |= {(edit.name, edit.axes[0]) for edit in symmetry.weights}
        if self.online:
            rotate_remaining(program, changes, rotated, self.name)
        if self.keys:
            rotate_keys(program, changes, self.name)
        return changes.result(found.refusals)


def _matrices(symmetry: Symmetry, seed: int) -> Tensor:
    matrix = rotation_matrix(symmetry.size, seed)
    return torch.stack([matrix] * symmetry.blocks)
