import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.norm_quantize.reference import norm_quantize
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from tests.kernels.cases import DTYPE_IDS, FLOATING, pre_scale_of, strided
from tests.kernels.tolerances import assert_close

NAME = "norm_quantize"
OP = KERNELS[NAME].overload
EPS = 1e-5

cases = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 9), st.integers(1, 150)),
        "dtype": st.sampled_from(FLOATING),
        "norm": st.sampled_from(["layer", "rms"]),
        "added": st.booleans(),
        "asymmetric": st.booleans(),
        "keep": st.tuples(st.booleans(), st.booleans()),
        "scaled": st.booleans(),
        "bad": st.sampled_from([None, float("nan"), float("inf")]),
    }
)


def arguments(shape, dtype, norm, added, asymmetric, keep, scaled, bad):
    x, residual = torch.randn(2, *shape).to(dtype)
    if bad is not None:
        x[0, -1] = bad
    gain, shift = torch.randn(2, shape[-1]).to(dtype)
    pre_scale = pre_scale_of(shape[-1]) if scaled else None
    return (
        x,
        residual if added else None,
        gain,
        None if norm == "rms" else shift,
        EPS,
        norm,
        asymmetric,
        *keep,
        pre_scale,
    )


def same(actual, expected):
    return torch.equal(actual.float().nan_to_num(-1e9), expected.float().nan_to_num(-1e9))


@pytest.mark.parametrize("operator", [OP, norm_quantize], ids=["native", "reference"])
def test_it_quantizes_what_it_makes_to_the_bit(native, operator):
    """The codes are those of y, whatever else is asked for."""

    @given(cases)
    @settings(deadline=None, max_examples=150)
    def check(case):
        args = arguments(**case)
        keep_total, keep_norm = case["keep"]
        made = operator(*args)
        y = made[1] if keep_norm else operator(*args[:8], True, args[9])[1]
        codes = quantize_rows(y, case["asymmetric"], args[9])
        for actual, expected in zip(made[2:], codes, strict=True):
            absent = expected is None
            assert actual.numel() == 0 if absent else same(actual, expected)
        assert (made[0].numel() > 0, made[1].numel() > 0) == (keep_total, keep_norm)
        if keep_total:
            assert same(made[0], args[0] + args[1] if case["added"] else args[0])

    check()


@given(cases)
@settings(deadline=None, max_examples=60)
def test_agreement_with_the_reference(native, case):
    args = arguments(**case)
    for each in (args, (strided(args[0]), *args[1:])):
        actual, expected = OP(*each), norm_quantize(*args)
        for a, e in zip(actual[:2], expected[:2], strict=True):
            assert_close(NAME, a, e)
        for a, e in zip(actual[2:], expected[2:], strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 7), (2, 3, 129), (70, 384), (9,)])
def test_it_is_the_operators_it_joins_to_the_bit(native, shape, dtype):
    x, residual = torch.randn(2, *shape).to(dtype)
    gain, shift = torch.randn(2, shape[-1]).to(dtype)
    joined = KERNELS["add_layer_norm"].overload(x, residual, gain, shift, EPS)
    made = OP(x, residual, gain, shift, EPS, "layer", False, False, True)
    assert torch.equal(made[1], joined)
    for a, e in zip(made[2:4], KERNELS["quantize_per_token"].overload(joined), strict=True):
        assert torch.equal(a, e)
    total = x + residual
    joined = KERNELS["fused_rms_norm"].overload(total, gain, EPS)
    made = OP(x, residual, gain, None, EPS, "rms", False, True, True)
    assert torch.equal(made[0], total)
    assert torch.equal(made[1], joined)
    for a, e in zip(made[2:4], KERNELS["quantize_per_token"].overload(joined), strict=True):
        assert torch.equal(a, e)


@given(cases)
@settings(deadline=None, max_examples=40)
def test_tokens_do_not_see_each_other(native, case):
    """Permuted rows give permuted results, to the bit."""
    args = arguments(**case)
    order = torch.randperm(case["shape"][0])
    permuted = [None if part is None else part[order] for part in args[:2]]
    for a, e in zip(OP(*permuted, *args[2:]), OP(*args), strict=True):
        assert same(a, e[order] if e.numel() else e)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_it_is_torch_in_float64(run, norm):
    x, residual = torch.randn(2, 5, 70, dtype=torch.float64)
    gain, shift = torch.randn(2, 70, dtype=torch.float64)
    for weight, bias in ((gain, shift), (gain, None), (None, None), (None, shift)):
        if norm == "rms" and bias is not None:
            continue
        total = x + residual
        expected = (
            functional.layer_norm(total, (70,), weight, bias, EPS)
            if norm == "layer"
            else functional.rms_norm(total, (70,), weight, EPS)
        )
        made = run(NAME, x, residual, weight, bias, EPS, norm, True, True, True)
        torch.testing.assert_close(made[0], total, rtol=0, atol=0)
        torch.testing.assert_close(made[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_nan_stays_in_its_row(run, asymmetric):
    x = torch.randn(3, 70)
    x[1, 69] = float("nan")
    made = run(NAME, x, None, None, None, EPS, "layer", asymmetric, False, True)
    assert made[1].isnan().all(1).tolist() == [False, True, False]
    assert made[3].isfinite().flatten().tolist() == [True, False, True]
    assert made[2][1].eq(0).all()


def test_refusals(run):
    x, ones = torch.randn(3, 5), torch.ones(5)

    def call(*args, norm="layer", pre_scale=None):
        return run(NAME, *args, EPS, norm, True, False, True, pre_scale)

    with pytest.raises(KernelError, match="unknown norm 'batch'; valid: layer, rms"):
        call(x, None, ones, ones, norm="batch")
    with pytest.raises(KernelError, match="an rms norm has no bias"):
        call(x, None, ones, ones, norm="rms")
    with pytest.raises(KernelError, match="x and residual must have one shape and dtype"):
        call(x, x[:2], ones, ones)
    with pytest.raises(KernelError, match="bias must have 5 elements"):
        call(x, x, ones, ones[:4])
    with pytest.raises(KernelError, match="pre_scale must have 5 elements"):
        call(x, x, ones, ones, pre_scale=torch.ones(6))
    for empty in (torch.tensor(1.0), torch.ones(3, 0)):
        with pytest.raises(KernelError, match="with D at least 1"):
            call(empty, None, None, None)


@pytest.mark.parametrize("keep", [(True, True), (False, False)])
def test_opcheck(native, keep):
    x, residual = torch.randn(2, 3, 4, 7)
    gain, shift = torch.randn(2, 7)
    torch.library.opcheck(OP, (x, residual, gain, shift, EPS, "layer", True, *keep))
    torch.library.opcheck(OP, (x, None, gain, None, EPS, "rms", False, *keep, pre_scale_of(7)))
