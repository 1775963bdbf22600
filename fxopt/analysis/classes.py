"""Solve the relations between labels: which coordinates change together, and which not at all.

For factors every label exists twice, as itself and as its inverse; a coupling joins the two pairs.
A label that ends up with its own inverse has the factor one. Products are resolved where one of
the three factors is known to be one; what is left is a choice: the factor with fewer coordinates
gives way, or the first.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxopt.analysis.relations import FIXED, Kind, Labels, Reason, Relations

_UNKNOWN = Reason("", "", "what one use multiplies, another would have to divide")
_OUTSIDE = Reason("", "", "it is an input, or computed from what cannot change")
_CHOICE = Reason("", "", "the other factor of a product takes the scale up")


@dataclass(frozen=True)
class Classes:
    """The outcome: per label its class, its direction in it, and why it is fixed (-1: it is free).

    Attributes:
        of: class of each label.
        inverse: whether a label changes inversely to its class.
        reason: per class, an index into `reasons`, or -1.
        reasons: why classes are fixed.
    """

    of: Labels
    inverse: npt.NDArray[np.bool_]
    reason: Labels
    reasons: list[Reason]

    def free(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """Which labels may change."""
        return self.reason[self.of[labels]] < 0

    def why(self, label: int) -> Reason:
        """Why a label may not change."""
        return _OUTSIDE if label == FIXED else self.reasons[int(self.reason[self.of[label]])]


def solve(relations: Relations) -> Classes:
    """Join labels into classes until no product is left."""
    pending = list(relations.products)
    while True:
        classes = _components(relations)
        if not pending:
            return classes
        pending, progress = _resolve(relations, classes, pending)
        if not progress:
            for _, a, b in pending:
                relations.fixes.append((_that_gives_way(classes, a, b), _CHOICE))


def _that_gives_way(classes: Classes, a: Labels, b: Labels) -> Labels:
    """Of two factors the one with fewer coordinates keeps the factor one, else the first."""
    a, b = np.unique(a), np.unique(b)
    return b if np.unique(classes.of[b]).size < np.unique(classes.of[a]).size else a


def _components(relations: Relations) -> Classes:
    count = relations.count
    empty: list[Labels] = [np.empty(0, dtype=np.int64)]
    heads: list[Labels] = []
    tails: list[Labels] = []
    for a, b, inverse in relations.couplings:
        heads += [a, a + count]
        tails += [b + count, b] if inverse else [b, b + count]
    a, b = np.concatenate(heads or empty), np.concatenate(tails or empty)
    graph = coo_array((np.ones(a.size, dtype=np.bool_), (a, b)), shape=(2 * count, 2 * count))
    _, component = connected_components(graph, directed=False)
    plain, mirrored = component[:count].astype(np.int64), component[count:].astype(np.int64)
    # A class is named by the smaller of its two components.
    of = np.minimum(plain, mirrored)
    inverse = mirrored < plain
    reasons = [_UNKNOWN]
    reason = np.full(2 * count, -1, dtype=np.int64)
    if relations.kind is Kind.SCALE:
        reason[of[plain == mirrored]] = 0
    for labels, why in reversed(relations.fixes):  # the earliest in the graph is kept
        reasons.append(why)
        reason[of[labels]] = len(reasons) - 1
    reason[of[FIXED]] = 0
    return Classes(of, inverse, reason, reasons)


def _resolve(
    relations: Relations, classes: Classes, pending: list[tuple[Labels, Labels, Labels]]
) -> tuple[list[tuple[Labels, Labels, Labels]], bool]:
    left: list[tuple[Labels, Labels, Labels]] = []
    progress = False
    inverse = relations.kind is Kind.SCALE
    for out, a, b in pending:
        one_a, one_b, one_out = (~classes.free(x) for x in (a, b, out))
        relations.couple(out[one_a], b[one_a])
        only_b = one_b & ~one_a
        relations.couple(out[only_b], a[only_b])
        only_out = one_out & ~one_a & ~one_b
        relations.couple(a[only_out], b[only_out], inverse=inverse)
        rest = ~(one_a | one_b | one_out)
        progress = progress or not rest.all()
        if rest.any():
            left.append((out[rest], a[rest], b[rest]))
    return left, progress
