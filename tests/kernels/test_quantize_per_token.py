import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.quantize_per_token.reference import quantize_per_token, quantize_rows
from tests.kernels.cases import DTYPE_IDS, FLOATING, pre_scale_of, strided

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


@given(
    st.integers(1, 40).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=k, max_size=k),
            min_size=2,
            max_size=5,
        )
    ),
    st.sampled_from(FLOATING),
    st.sampled_from(FLOATING),
)
@settings(deadline=None)
def test_a_scale_per_channel_multiplies_in_float32(native, rows, dtype, scale_dtype):
    x, pre_scale = torch.tensor(rows[1:]).to(dtype), torch.tensor(rows[0]).to(scale_dtype)
    product = x.float() * pre_scale.float()
    for function in (OP, quantize_per_token):
        for actual, expected in zip(
            function(x, pre_scale), quantize_per_token(product), strict=True
        ):
            assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))
    for actual, expected in zip(
        quantize_rows(x, True, pre_scale), quantize_rows(product, True), strict=True
    ):
        assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 0), (33, 70), (2, 3, 129), (127, 576), (9,)])
def test_native_scales_channels_like_the_reference(native, shape, dtype):
    x, pre_scale = torch.randn(shape).to(dtype), pre_scale_of(shape[-1])
    for each in (x, strided(x), x.double()):
        for factors in (pre_scale, pre_scale.to(dtype), pre_scale.double(), strided(pre_scale)):
            for actual, expected in zip(
                OP(each, factors), quantize_per_token(each, factors), strict=True
            ):
                assert torch.equal(actual, expected)
        for actual, expected in zip(OP(each, None), OP(each), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_of_short_numbers_is_not_rounded(run, dtype):
    x, pre_scale = torch.randn(30, 70).to(dtype), pre_scale_of(70).to(dtype)
    exact = x.double() * pre_scale.double()
    for actual, expected in zip(
        run("quantize_per_token", x, pre_scale), quantize_per_token(exact.float()), strict=True
    ):
        assert torch.equal(actual, expected)
    assert (exact.float().double() == exact).all()
    assert (exact.to(dtype).double() != exact).any()


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
    for wrong in (torch.ones(2), torch.ones(4), torch.tensor(1.0)):
        with pytest.raises(KernelError, match="pre_scale must have 3 elements, got"):
            run("quantize_per_token", torch.ones(2, 3), wrong)
    with pytest.raises(KernelError, match="pre_scale must be float32, bfloat16"):
        run("quantize_per_token", torch.ones(2, 3), torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
def test_opcheck(native, dtype):
    torch.library.opcheck(OP, (torch.randn(3, 5, 7).to(dtype),))
    torch.library.opcheck(OP, (strided(torch.randn(3, 5)),))
    torch.library.opcheck(OP, (torch.randn(3, 5).to(dtype), pre_scale_of(5)))
