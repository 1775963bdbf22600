import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.quantize_per_token.reference import quantize_per_token
from tests.kernels.cases import DTYPE_IDS, FLOATING, strided

OP = KERNELS["quantize_per_token"].overload
TINY = torch.finfo(torch.float32).tiny

rows_of_floats = st.integers(1, 40).flatmap(
    lambda k: st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=k, max_size=k),
        min_size=1,
        max_size=5,
    )
)


@given(rows_of_floats)
@settings(deadline=None)
def test_error_is_at_most_half_a_step(rows):
    x = torch.tensor(rows)
    q, scale = quantize_per_token(x)
    error = (x.double() - q.double() * scale.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    assert q.abs().max() <= 127


@given(rows_of_floats)
@settings(deadline=None)
def test_sign_symmetry_and_permutation(rows):
    x = torch.tensor(rows)
    q, scale = quantize_per_token(x)
    negated, same = quantize_per_token(-x)
    assert torch.equal(negated, -q)
    assert torch.equal(same, scale)
    order = torch.randperm(len(x))
    permuted, moved = quantize_per_token(x[order])
    assert torch.equal(permuted, q[order])
    assert torch.equal(moved, scale[order])


def test_ties_go_to_even(run):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    q, scale = run("quantize_per_token", x)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, -126]]


def test_zero_rows_are_zero(run):
    x = torch.zeros(3, 70)
    x[1] = 1.0
    q, scale = run("quantize_per_token", x)
    assert q[0].eq(0).all()
    assert q[1].eq(127).all()
    assert scale[0].item() == TINY


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_show_it(run, bad):
    x = torch.randn(4, 33)
    x[2, 7] = bad
    q, scale = run("quantize_per_token", x)
    assert scale.isfinite().flatten().tolist() == [True, True, False, True]
    assert q[2].eq(0).all()
    assert not (q[2].float() * scale[2]).isfinite().any()


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (2, 0, 7), (4, 0), (33, 70), (2, 3, 129), (127, 576), (9,)]
)
def test_native_is_the_reference(native, shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    for each in (x, strided(x), x.double()):
        for actual, expected in zip(OP(each), quantize_per_token(each), strict=True):
            assert torch.equal(actual, expected)
            assert actual.stride() == expected.stride()


@given(rows_of_floats)
@settings(deadline=None)
def test_native_is_the_reference_on_any_floats(native, rows):
    x = torch.tensor(rows)
    for actual, expected in zip(OP(x), quantize_per_token(x), strict=True):
        assert torch.equal(actual, expected)


def test_tiny_values_keep_a_normal_scale(run):
    x = torch.tensor([[1e-40, -3e-39, 0.0], [2e-38, 1e-38, 0.0]])
    q, scale = run("quantize_per_token", x)
    assert (scale >= TINY).all()
    assert ((x - q * scale).abs() <= scale * 0.51).all()


def test_refusals(run):
    with pytest.raises(KernelError, match=r"quantize_per_token needs a tensor \[\.\.\., K\]"):
        run("quantize_per_token", torch.tensor(1.0))
    with pytest.raises(KernelError, match="x must be float32, bfloat16"):
        run("quantize_per_token", torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
def test_opcheck(native, dtype):
    torch.library.opcheck(OP, (torch.randn(3, 5, 7).to(dtype),))
    torch.library.opcheck(OP, (strided(torch.randn(3, 5)),))
