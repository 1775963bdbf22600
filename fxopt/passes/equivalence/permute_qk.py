"""Put the channels of queries and keys in another order, head by head.

    q_pi k_pi^T = q k^T;   with rotary embedding whole pairs move, and their cos and sin with them

Shapes: Wq [H D, d] and Wk [Hkv D, d], rows; pi of D per kv head, of D / 2 pairs with rotary
    embedding; cos and sin [B, 1, S, R] get an index in front of the operator that reads them.
Exactness: equal over the reals; every number keeps its value.
Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
    arXiv:2104.09864 (pairs turn by their own angle, so a pair may move only with its angle).
"""

from dataclasses import dataclass

from fxopt.passes.base import register
from fxopt.passes.equivalence.permutation import Permutation


@register("permute-qk")
@dataclass(frozen=True)
class PermuteQk(Permutation):
    """Put the channels of queries and keys in another order, head by head."""

    role = "query_key"
