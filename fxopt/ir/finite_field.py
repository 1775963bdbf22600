"""The squares of a finite field GF(p^k), which Paley's Hadamard matrices are made of."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import KernelError


def prime_power(q: int) -> tuple[int, int] | None:
    """The prime p and exponent k of q = p^k, or None if q is no power of a prime."""
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    power, exponent = prime, 1
    while 1 < power < q:
        power, exponent = power * prime, exponent + 1
    return (prime, exponent) if q > 1 and power == q else None


def field_differences(q: int) -> NDArray[np.int8]:
    """Paley's matrix Q[a, b] = chi(a - b): +1 on non-zero squares of GF(q), -1 on the others, or 0.

    Shapes: -> [q, q]. Elements are numbered by their digits base p.

    Raises:
        KernelError: q is not a power of an odd prime.

    Source: Paley, On orthogonal matrices, Journal of Mathematics and Physics 12, 1933.
    """
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise KernelError(
            f"the squares of a field of {q} elements were asked for; Paley's matrix needs a power "
            "of an odd prime."
        )
    prime, degree = found
    weights = prime ** np.arange(degree)
    character = np.zeros(q, dtype=np.int8)
    for exponent, element in enumerate(_powers_of_a_generator(prime, degree)):
        character[int(np.dot(element, weights))] = 1 if exponent % 2 == 0 else -1
    digits = (np.arange(q)[:, None] // weights) % prime
    differences = (digits[:, None, :] - digits[None, :, :]) % prime
    return character[differences @ weights]


def _powers_of_a_generator(prime: int, degree: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ... as coefficients, where x runs through every non-zero element.

    x is a root of x^k = c_0 + c_1 x + ... + c_{k-1} x^{k-1}. Where its powers are all q - 1
    non-zero polynomials, each of them has an inverse: the ring is the field, and the even powers
    are its squares. Every finite field has such an x.
    """
    orbits = (_powers(c, prime) for c in product(range(prime), repeat=degree))
    return next(powers for powers in orbits if len(powers) == prime**degree - 1)


def _powers(coefficients: tuple[int, ...], prime: int) -> list[tuple[int, ...]]:
    """The powers of x until they come back to 1, or until it is clear that they do not."""
    one = (1, *(0,) * (len(coefficients) - 1))
    powers: list[tuple[int, ...]] = [one]
    element = _times_x(one, coefficients, prime)
    while element != one and any(element) and len(powers) < prime ** len(one):
        powers.append(element)
        element = _times_x(element, coefficients, prime)
    return powers


def _times_x(
    element: tuple[int, ...], coefficients: tuple[int, ...], prime: int
) -> tuple[int, ...]:
    carried, shifted = element[-1], (0, *element[:-1])
    return tuple((a + carried * c) % prime for a, c in zip(shifted, coefficients, strict=True))
