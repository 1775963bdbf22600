"""The bases of Hadamard matrices: Paley's, from the squares of a finite field, and Williamson's."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import KernelError
from fxopt.ir.finite_field import field_differences, prime_power

Signs = NDArray[np.int8]
SYLVESTER: Signs = np.array([[1, 1], [1, -1]], dtype=np.int8)

# A base is multiplied densely, so larger ones would cost more than the butterflies they replace.
LARGEST_BASE = 256

# Entries 1 .. (n - 1) / 2 of the first rows of four symmetric circulants of order n whose squares
# add up to 4n I; entry 0 is +. Found by search: for 43 among rows that the multiplier 6 keeps,
# for 39 with the last three rows the images of one another under the multiplier 16.
_WILLIAMSON = {
    39: (
        "---+---+-++-++----+",
        "+--+++-+--++-+-----",
        "---+--++++----+-+-+",
        "-++------++--+-+-++",
    ),
    43: (
        "++++-++----+-++--++-+",
        "++---++--+-+-+-++----",
        "+-+-++++-+--+--+++--+",
        "-++-----++++-+-+++-++",
    ),
}


@cache
def has_base(base: int) -> bool:
    """Whether `base_signs` has a matrix of this order."""
    if not 1 <= base <= LARGEST_BASE:
        return False
    if base == 1 or _paley_field(base, 1) or _paley_field(base, 2):
        return True
    return base % 4 == 0 and base // 4 in _WILLIAMSON


def _paley_field(base: int, kind: int) -> int | None:
    """The order q of the field that Paley's first or second construction needs for a base."""
    if base % 4:
        return None
    q = base // kind - 1
    return q if q % 4 == (3 if kind == 1 else 1) and prime_power(q) else None


# numpy holds the cached bases: a tensor that was first made in inference mode or under fake
# tensors would stay one for every later caller.
@cache
def base_signs(base: int) -> Signs:
    """A matrix of entries +1 and -1 with B B^T = m I; shared, so not to be written to.

    Shapes: -> int8 [m, m].

    Raises:
        KernelError: no construction gives a base of this order.

    Source: Paley, On orthogonal matrices, Journal of Mathematics and Physics 12, 1933;
        Williamson, Hadamard's determinant theorem and the sum of four squares, Duke Mathematical
        Journal 11, 1944; Baumert and Hall, Hadamard matrices of the Williamson type, Mathematics
        of Computation 19, 1965.
    """
    if not has_base(base):
        raise KernelError(no_matrix(base))
    if base == 1:
        return np.ones((1, 1), dtype=np.int8)
    if (q := _paley_field(base, 1)) is not None:
        return _bordered(q, -1) + np.eye(base, dtype=np.int8)
    if (q := _paley_field(base, 2)) is not None:
        diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        unit = np.eye(q + 1, dtype=np.int8)
        return np.kron(_bordered(q, 1), SYLVESTER) + np.kron(unit, diagonal)
    return _williamson(base // 4)


def _bordered(q: int, sign: int) -> Signs:
    """Paley's conference matrix [[0, 1], [sign, Q]], Q[a, b] = chi(a - b) over GF(q)."""
    matrix = np.zeros((q + 1, q + 1), dtype=np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = field_differences(q)
    return matrix


def _williamson(size: int) -> Signs:
    shift = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
    blocks: list[Signs] = []
    for half in _WILLIAMSON[size]:
        signs = [1 if sign == "+" else -1 for sign in half]
        blocks.append(np.array([1, *signs, *reversed(signs)], dtype=np.int8)[shift])
    a, b, c, d = blocks
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def no_matrix(order: int) -> str:
    """The message for an order without a matrix."""
    return (
        f"a Hadamard matrix of order {order} was asked for; fxopt knows none of that order. Use "
        "rotation_matrix, which falls back to a dense orthogonal matrix, or blocks of a power of "
        "two that divides it."
    )
