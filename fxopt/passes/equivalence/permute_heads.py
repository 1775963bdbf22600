"""Put attention heads in another order: query heads within a kv head's group, and whole groups.

    out = concat_h(softmax(q_h k_g(h)^T) v_g(h)) Wo^T is a sum over heads, in any order

Shapes: rows of Wq, Wk, Wv and columns of Wo in blocks of D; H / Hkv query heads per group.
Exactness: equal over the reals; every number keeps its value.
Source: Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv:1905.10650
    (heads add up independently).
"""

from dataclasses import dataclass

from fxopt.analysis.relations import Unit
from fxopt.passes.base import register
from fxopt.passes.equivalence.permutation import Permutation


@register("permute-heads")
@dataclass(frozen=True)
class PermuteHeads(Permutation):
    """Put attention heads in another order: within a kv head's group, and whole groups."""

    role = "heads"
    units = (Unit.HEAD, Unit.GROUP)
