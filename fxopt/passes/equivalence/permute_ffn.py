"""Put the neurons of feed-forward blocks in another order.

    h_pi = act(x W1[pi]^T + b1[pi]),   y = h_pi W2[:, pi]^T

Shapes: x [..., d]; W1, b1 over f neurons (gate and up alike); W2 [d, f]; pi of f.
Exactness: equal over the reals; every number keeps its value.
Source: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
"""

from dataclasses import dataclass

from fxopt.passes.base import register
from fxopt.passes.equivalence.permutation import Permutation


@register("permute-ffn")
@dataclass(frozen=True)
class PermuteFfn(Permutation):
    """Put the neurons of feed-forward blocks in another order."""

    role = "hidden"
