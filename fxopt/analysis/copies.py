"""In which order the copies of a coordinate stand, the same in every tensor that holds them.

A coordinate that was copied stands at several places of a tensor, which are alike in all that was
done to them: two copies of a hidden unit, the channels of a head, the query heads of one kv head.
Coordinates change places copy by copy, and the first copies of all tensors belong together.

Labels that stand for each other place by place are one thread. Where one label meets several, these
are its copies, threads of their own, ranked by what they were copied from, then by number.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxopt.analysis.relations import Kind, Labels, Relations

_DEPTH = 8  # how often copies are copied again


def ranks_of_copies(relations: Relations) -> Labels:
    """A rank per label; among labels of one coordinate it orders the copies."""
    count = relations.count
    if relations.kind in (Kind.SCALE, Kind.SIGN):  # copies have one factor
        return np.zeros(count, dtype=np.int64)
    threads, origin = _threads(relations)
    number = np.full(count, count, dtype=np.int64)  # of a thread: that of its first label
    np.minimum.at(number, threads, np.arange(count, dtype=np.int64))
    rank = number
    for _ in range(_DEPTH):
        order = np.lexsort((number, rank[origin]))
        pairs = np.stack((rank[origin], number))[:, order]
        new = np.empty_like(rank)
        steps = np.any(pairs[:, 1:] != pairs[:, :-1], axis=0)
        new[order] = np.concatenate(([0], np.cumsum(steps)))
        if np.array_equal(new, rank):
            break
        rank = new
    return rank[threads]


def _threads(relations: Relations) -> tuple[Labels, Labels]:
    """The thread of each label, and per thread the one it is a copy of, perhaps itself."""
    count = relations.count
    alike: list[Labels] = [np.empty((2, 0), dtype=np.int64)]
    copied: list[Labels] = []  # pairs (copy, what it is a copy of)
    for a, b, _ in relations.couplings:
        pairs = np.unique(np.stack((a, b)), axis=1)
        once = [np.unique(side).size == side.size for side in pairs]
        if all(once):
            alike.append(pairs)
        elif any(once):
            copied.append(pairs if once[0] else pairs[::-1])
    edges = np.concatenate(alike, axis=1)
    ones = np.ones(edges.shape[1], dtype=np.bool_)
    graph = coo_array((ones, (edges[0], edges[1])), shape=(count, count))
    _, threads = connected_components(graph, directed=False)
    origin = np.arange(count, dtype=np.int64)
    for pairs in reversed(copied):  # the first in the graph is kept
        copy, source = threads[pairs]
        origin[copy[copy != source]] = source[copy != source]
    return threads.astype(np.int64), origin
