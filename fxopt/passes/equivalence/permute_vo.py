"""Put the channels of values in another order, head by head.

    v_pi = x Wv[pi]^T,   y = (softmax(q k^T) v_pi) Wo[:, pi]^T

Shapes: Wv [Hkv D, d], rows; Wo [d, H D], columns of the H / Hkv query heads of a kv head alike;
    pi of D per kv head.
Exactness: equal over the reals; every number keeps its value.
Source: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
"""

from dataclasses import dataclass

from fxopt.passes.base import register
from fxopt.passes.equivalence.permutation import Permutation


@register("permute-vo")
@dataclass(frozen=True)
class PermuteVo(Permutation):
    """Put the channels of values in another order, head by head."""

    role = "value"
