"""Put the channels of the residual stream in another order, in the whole model at once.

    x_pi:  embedding columns, gains and biases of norms, columns of readers, rows of writers

Shapes: pi of d, one for each stream (an encoder-decoder has two).
Exactness: equal over the reals; every number keeps its value.
Source: Martinez et al., Permute, Quantize, and Fine-tune: Efficient Compression of Neural
    Networks, CVPR 2021, arXiv:2010.15703 (permutations shared by all that meets one stream).
"""

from dataclasses import dataclass

from fxopt.ir.program import Program
from fxopt.passes.base import register
from fxopt.passes.equivalence.permutation import Permutation


@register("permute-residual")
@dataclass(frozen=True)
class PermuteResidual(Permutation):
    """Put the channels of the residual stream in another order, in the whole model at once.

    `restore_output` allows it where the stream is an output: one index brings it back.
    """

    restore_output: bool = False

    role = "residual"

    def restored(self, program: Program) -> frozenset[str]:
        """Every output, if that was asked for."""
        names = (spec.name for spec in program.signature.outputs)
        return frozenset(names) if self.restore_output else frozenset()
