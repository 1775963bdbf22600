"""Hadamard matrices, and the orthogonal matrices that rotations of activations are made of.

A matrix of order 2^k m is the Kronecker product of Sylvester's matrix of order 2^k and a base of
order m from `fxopt.ir.hadamard_bases`.
"""

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.ir.hadamard_bases import SYLVESTER, base_signs, has_base, no_matrix


def hadamard_factors(order: int) -> tuple[int, int] | None:
    """The factors (2^k, m) of an order that has a matrix here, with the smallest base m.

    None where no construction is known to fxopt: Sylvester's gives m = 1, Paley's m = q + 1 for
    prime powers q = 3 (mod 4) and m = 2 (q + 1) for q = 1 (mod 4), Williamson's m = 156 and 172.
    """
    if order < 1:
        return None
    power = order & -order
    base = order // power
    while power > 0:
        if has_base(base):
            return power, base
        base, power = base * 2, power // 2
    return None


def supported_order(order: int) -> bool:
    """Whether `hadamard_matrix` has a matrix of this order."""
    return hadamard_factors(order) is not None


def hadamard_base(base: int) -> Tensor:
    """The entries +1 and -1 of the base of order m, as float64 [m, m]; not normalized.

    Raises:
        KernelError: no construction gives a base of this order.
    """
    return torch.from_numpy(base_signs(base).astype(np.float64))


def hadamard_matrix(order: int) -> Tensor:
    """The normalized Hadamard matrix, H = (S_2 x ... x S_2 x B_m) / sqrt(n), H H^T = I.

    Shapes: -> float64 [n, n]. Entries are +-1/sqrt(n); H is symmetric only where B_m is.

    Raises:
        KernelError: no construction gives a matrix of this order.

    Source: Sylvester, Thoughts on inverse orthogonal matrices, Philosophical Magazine 34, 1867.
    """
    factors = hadamard_factors(order)
    if factors is None:
        raise KernelError(no_matrix(order))
    power, base = factors
    signs = base_signs(base)
    while power > 1:
        signs, power = np.kron(SYLVESTER, signs), power // 2
    return torch.from_numpy(signs.astype(np.float64)) / order**0.5


def random_hadamard(order: int, seed: int) -> Tensor:
    """A random-sign Hadamard matrix, Q = diag(s) H with s uniform in {-1, +1}^n.

    Shapes: -> float64 [n, n]. The same seed gives the same matrix.

    Raises:
        KernelError: no construction gives a matrix of this order.

    Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024,
        arXiv:2404.00456.
    """
    matrix = hadamard_matrix(order)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    signs = torch.randint(0, 2, (order, 1), generator=generator, device="cpu") * 2 - 1
    return matrix * signs.to(torch.float64)


def random_orthogonal(order: int, seed: int) -> Tensor:
    """A uniformly random orthogonal matrix, Q diag(sign(diag(R))) of the QR of a Gaussian.

    Shapes: -> float64 [n, n]. The same seed gives the same matrix on the same build of LAPACK.

    Raises:
        KernelError: the order is below one.

    Source: Mezzadri, How to generate random matrices from the classical compact groups, Notices
        of the AMS 54, 2007, arXiv:math-ph/0609050.
    """
    if order < 1:
        raise KernelError(
            f"an orthogonal matrix of order {order} was asked for; ask for 1 or more."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)


def rotation_matrix(order: int, seed: int) -> Tensor:
    """A random rotation: `random_hadamard` where there is one, else `random_orthogonal`.

    Shapes: -> float64 [n, n].

    Raises:
        KernelError: the order is below one.
    """
    return (
        random_hadamard(order, seed) if supported_order(order) else random_orthogonal(order, seed)
    )
