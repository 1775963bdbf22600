"""Hadamard matrices of every construction, and the rotations made of them."""

import pytest
import torch

from fxopt.errors import KernelError
from fxopt.ir import hadamard
from fxopt.ir.finite_field import field_differences, prime_power
from fxopt.ir.hadamard_bases import LARGEST_BASE

BASES = (1, 12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172)
# Widths of models: SmolLM2, Qwen2 (hidden and FFN), TinyLlama, Llama-2 (7B and 13B), Qwen2-7B.
WIDTHS = {
    576: (16, 36),
    1536: (128, 12),
    896: (32, 28),
    4864: (64, 76),
    8960: (64, 140),
    5632: (128, 44),
    11008: (64, 172),
    13824: (128, 108),
    18944: (128, 148),
    4096: (4096, 1),
}
UNSUPPORTED = (-4, 0, 3, 6, 10, 18, 92, 1026)


@pytest.mark.parametrize("order", sorted({base * k for base in BASES for k in (1, 2, 4)}))
def test_entries_are_flat_and_rows_orthonormal(order):
    matrix = hadamard.hadamard_matrix(order)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (order, order)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=0, atol=1e-15)
    unit = torch.eye(order, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, unit, rtol=0, atol=1e-12)
    assert torch.allclose(matrix.T @ matrix, unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "base", [n for n in range(1, LARGEST_BASE + 1) if hadamard.supported_order(n)]
)
def test_every_order_up_to_the_largest_base(base):
    power, m = hadamard.hadamard_factors(base)
    assert power * m == base
    assert power & (power - 1) == 0
    for order in (m, base):
        signs = hadamard.hadamard_matrix(order) * order**0.5
        assert torch.allclose(signs.abs(), torch.ones_like(signs))
        unit = torch.eye(order, dtype=torch.float64)
        assert torch.allclose(signs @ signs.T, order * unit, atol=1e-10)
    assert set(hadamard.hadamard_base(m).unique().tolist()) <= {-1.0, 1.0}


def test_bases_above_the_largest_are_refused():
    assert LARGEST_BASE == 256
    with pytest.raises(KernelError, match="order 312"):
        hadamard.hadamard_base(312)  # 311 is a prime = 3 (mod 4), and 156 is a base
    assert hadamard.hadamard_factors(312) == (2, 156)


@pytest.mark.parametrize(("width", "factors"), WIDTHS.items())
def test_widths_of_models_have_small_bases(width, factors):
    assert hadamard.hadamard_factors(width) == factors


def test_a_matrix_is_the_kronecker_product_of_its_factors():
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    expected = torch.kron(torch.kron(sylvester, sylvester), hadamard.hadamard_base(12)) / 48**0.5
    assert hadamard.hadamard_factors(48) == (4, 12)
    assert torch.equal(hadamard.hadamard_matrix(48), expected)


@pytest.mark.parametrize("order", [16, 60, 344])
def test_a_spike_becomes_flat(order):
    rotated = torch.eye(order, dtype=torch.float64)[3] @ hadamard.random_hadamard(order, 7)
    assert torch.allclose(rotated.abs(), torch.full_like(rotated, order**-0.5))


def test_results_belong_to_the_caller():
    with torch.inference_mode():
        hadamard.hadamard_matrix(12).zero_()
        hadamard.hadamard_base(12).zero_()
    again = hadamard.hadamard_matrix(12)
    assert not again.is_inference()
    assert float(again.abs().min()) > 0


@pytest.mark.parametrize("make", [hadamard.random_hadamard, hadamard.random_orthogonal])
@pytest.mark.parametrize("order", [1, 2, 12, 64])
def test_random_rotations_are_orthogonal_and_repeat(make, order):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    matrix = make(order, 3)
    assert matrix.dtype == torch.float64
    unit = torch.eye(order, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, unit, rtol=0, atol=1e-12)
    assert torch.equal(matrix, make(order, 3))
    assert torch.equal(before, torch.get_rng_state())
    if order > 2:
        assert not torch.equal(matrix, make(order, 4))


def test_random_signs_turn_rows():
    matrix, plain = hadamard.random_hadamard(20, 0), hadamard.hadamard_matrix(20)
    signs = (matrix * plain).sum(1, keepdim=True).round()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix, signs * plain)


def test_random_orthogonal_is_not_biased_by_the_signs_of_qr():
    # LAPACK makes the first entry of every column's reflector negative; unfixed, the mean of
    # the diagonal over draws is far from zero.
    entries = torch.stack([hadamard.random_orthogonal(3, seed)[0] for seed in range(150)])
    assert float(entries.mean(0).abs().max()) < 0.2


def test_rotation_matrix_takes_a_hadamard_matrix_where_there_is_one():
    assert torch.equal(hadamard.rotation_matrix(24, 5), hadamard.random_hadamard(24, 5))
    for order in (1, 3, 7, 50):
        matrix = hadamard.rotation_matrix(order, 5)
        unit = torch.eye(order, dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", UNSUPPORTED)
def test_orders_without_a_matrix_are_refused(order):
    assert hadamard.hadamard_factors(order) is None
    for make in (hadamard.hadamard_matrix, hadamard.hadamard_base):
        with pytest.raises(KernelError, match=rf"order {order} was asked for.*rotation_matrix"):
            make(order)
    with pytest.raises(KernelError, match=f"order {order}"):
        hadamard.random_hadamard(order, 0)


def test_a_rotation_has_a_positive_order():
    with pytest.raises(KernelError, match="ask for 1 or more"):
        hadamard.rotation_matrix(0, 0)


# --- the field behind Paley's matrices ------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (1, None),
        (2, (2, 1)),
        (6, None),
        (9, (3, 2)),
        (12, None),
        (25, (5, 2)),
        (27, (3, 3)),
        (97, (97, 1)),
    ],
)
def test_prime_powers(q, expected):
    assert prime_power(q) == expected


@pytest.mark.parametrize("q", [3, 7, 13, 25, 27, 81])
def test_the_character_of_a_field(q):
    matrix = torch.from_numpy(field_differences(q)).double()
    # Half of the non-zero elements are squares, and Q Q^T = q I - J.
    assert torch.equal(matrix.sum(1), torch.zeros(q, dtype=torch.float64))
    expected = q * torch.eye(q, dtype=torch.float64) - 1
    assert torch.equal(matrix @ matrix.T, expected)
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


def test_squares_of_a_prime_field_are_its_squares():
    row = field_differences(13)[:, 0]
    assert {a for a in range(13) if row[a] == 1} == {a * a % 13 for a in range(1, 13)}


@pytest.mark.parametrize("q", [0, 1, 4, 15])
def test_fields_without_paley_matrices_are_refused(q):
    with pytest.raises(KernelError, match="power of an odd prime"):
        field_differences(q)
