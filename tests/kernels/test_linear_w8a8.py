import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.linear_w8a8 import cpu
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    LINEAR_SHAPES,
    int8,
    strided,
    weight_of,
)
from tests.kernels.tolerances import assert_close

OP = KERNELS["linear_w8a8"].overload


def arguments(lead, k, n, *, static=False, zero_point=False):
    weight, weight_scale, bias = weight_of(n, k)
    q = int8(*lead, k)
    scale = torch.tensor([0.02]) if static else torch.rand(*lead, 1) * 0.02
    zero = torch.randint(-128, 128, scale.shape, dtype=torch.int32) if zero_point else None
    total = weight.sum(1, dtype=torch.int32) if zero_point else None
    return [q, scale, zero, weight, weight_scale, total, bias]


@given(st.integers(0, 6), st.integers(0, 80), st.integers(0, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_product_is_an_exact_integer(native, m, k, n, seed):
    torch.manual_seed(seed)
    q, weight = torch.randint(-128, 128, (m, k), dtype=torch.int8), int8(n, k)
    zero = torch.randint(-128, 128, (m, 1), dtype=torch.int32)
    expected = (q.long() - zero) @ weight.long().T
    ones, total = torch.ones(n), weight.sum(1, dtype=torch.int32)
    for run in (linear_w8a8, cpu.linear_w8a8, OP):
        y = run(q, torch.ones(m, 1), zero, weight, ones, total, None, "none", torch.float64)
        assert torch.equal(y, expected.double())


@pytest.mark.parametrize("m", [1, 3, 9, 10, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_values_do_not_saturate(run, m, sign):
    k, n = 4096, 67
    q = torch.full((m, k), 127, dtype=torch.int8)
    weight = torch.full((n, k), 127 * sign, dtype=torch.int8)
    one = torch.ones(1)
    y = run("linear_w8a8", q, one, None, weight, torch.ones(n), None, None, "none", torch.float64)
    assert y.eq(127 * 127 * k * sign).all()


def test_exact_chunks_stand_in_for_a_product_that_saturates(monkeypatch):
    monkeypatch.setattr(cpu, "int_mm_is_exact", lambda: False)
    q, weight = torch.full((3, 4100), 127, dtype=torch.int8), int8(5, 4100)
    expected = q.long() @ weight.long().T
    assert torch.equal(cpu.integer_product(q, weight).long(), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_agreement_with_the_reference(run, lead, k, n, zero_point, dtype):
    args = arguments(lead, k, n, zero_point=zero_point)
    expected = linear_w8a8(*args, "gelu", dtype)
    assert_close("linear_w8a8", run("linear_w8a8", *args, "gelu", dtype), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(2,), (30,)])
def test_activations_and_static_scales(run, lead, activation):
    for bias_dtype in (torch.float32, torch.bfloat16):
        args = arguments(lead, 72, 70, static=True, zero_point=True)
        args[-1] = args[-1].to(bias_dtype)
        expected = linear_w8a8(*args, activation, torch.float32)
        actual = run("linear_w8a8", *args, activation, torch.float32)
        assert_close("linear_w8a8", actual, expected)
        args[-1] = None
        expected = linear_w8a8(*args, activation, torch.float32)
        actual = run("linear_w8a8", *args, activation, torch.float32)
        assert_close("linear_w8a8", actual, expected)


@pytest.mark.parametrize("m", [3, 25])
def test_strides_do_not_matter(run, m):
    args = arguments((m,), 66, 35, zero_point=True)
    expected = linear_w8a8(*args, "none", torch.float32)
    loose = [None if a is None else strided(a) for a in args]
    assert_close("linear_w8a8", run("linear_w8a8", *loose, "none", torch.float32), expected)
    q = torch.cat((args[0], args[0]), 1)[:, :66]
    actual = run("linear_w8a8", q, *args[1:], "none", torch.float32)
    assert_close("linear_w8a8", actual, expected)


def test_scales_that_are_not_finite_reach_the_output(run):
    args = arguments((4,), 40, 30)
    args[1][1] = float("nan")
    args[1][2] = float("inf")
    y = run("linear_w8a8", *args, "none", torch.float32)
    assert y.isfinite().all(1).tolist() == [True, False, False, True]


def test_refusals(run):
    q, scale, _, weight, weight_scale, _, bias = arguments((4,), 8, 6)
    zero = torch.zeros(4, 1, dtype=torch.int32)
    f32 = torch.float32

    def refuse(match, *args):
        with pytest.raises(KernelError, match=match):
            run("linear_w8a8", *args)

    base = (weight, weight_scale, None, bias)
    refuse("unknown activation 'swish'; valid: none, relu", q, scale, None, *base, "swish", f32)
    refuse("dtype must be float32", q, scale, None, *base, "none", torch.int32)
    refuse("q must be int8", q.float(), scale, None, *base, "none", f32)
    refuse("scale must be float32", q, scale.double(), None, *base, "none", f32)
    refuse(r"one element or one per row \(4\)", q, scale[:2], None, *base, "none", f32)
    refuse("zero_point needs weight_sum", q, scale, zero, *base, "none", f32)
    refuse("zero_point must be int32", q, scale, scale, *base, "none", f32)
    refuse("K = 7", q[:, :7], scale, None, *base, "none", f32)
    refuse(
        "weight_scale must be float32 with N = 6",
        *(q, scale, None, weight, weight_scale[:5], None, bias, "none", f32),
    )
    refuse(
        "bias must have N = 6",
        *(q, scale, None, weight, weight_scale, None, bias[:5], "none", f32),
    )


@pytest.mark.parametrize("zero_point", [False, True])
def test_opcheck(native, zero_point):
    args = arguments((2, 5), 24, 6, zero_point=zero_point)
    torch.library.opcheck(OP, (*args, "gelu", torch.bfloat16))
