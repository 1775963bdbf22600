from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fxopt.ir.operators  # noqa: F401
from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.dynamic_linear_w8a8.reference import dynamic_linear_w8a8
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    LINEAR_SHAPES,
    pre_scale_of,
    row_sums,
    strided,
    weight_of,
)
from tests.kernels.tolerances import assert_close

NAME = "dynamic_linear_w8a8"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_agreement_with_the_reference(run, lead, k, n, dtype):
    weight, scale, bias = weight_of(n, k)
    x = (torch.randn(*lead, k) + 0.4).to(dtype)
    for total in (None, row_sums(weight)):
        expected = dynamic_linear_w8a8(x, weight, scale, total, bias, "silu")
        for each in (x, strided(x)):
            assert_close(NAME, run(NAME, each, weight, scale, total, bias, "silu"), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_a_scale_per_channel_is_a_product_in_float32(run, lead, k, n, dtype):
    weight, scale, bias = weight_of(n, k)
    x, pre_scale = torch.randn(*lead, k).to(dtype), pre_scale_of(k)
    for total, factors in product((None, row_sums(weight)), (pre_scale, pre_scale.to(dtype))):
        scaled = x.float() * factors.float()
        expected = dynamic_linear_w8a8(scaled, weight, scale, total, bias, "silu").to(dtype)
        args = (weight, scale, total, bias, "silu")
        assert torch.equal(dynamic_linear_w8a8(x, *args, factors), expected)
        for each in (x, strided(x)):
            assert_close(NAME, run(NAME, each, *args, factors), expected)
            assert torch.equal(run(NAME, each, *args, None), run(NAME, each, *args))


@given(
    st.integers(1, 40).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=k, max_size=k),
            min_size=2,
            max_size=12,
        )
    ),
    st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scaled_rows_of_any_floats(native, rows, asymmetric):
    pre_scale, x = torch.tensor(rows[0]), torch.tensor(rows[1:])
    weight, scale, _ = weight_of(5, x.size(1))
    args = (weight, scale, row_sums(weight) if asymmetric else None, None, "none")
    expected = dynamic_linear_w8a8(x * pre_scale, *args)
    for function in (OP, KERNELS[NAME].aten, dynamic_linear_w8a8):
        assert torch.equal(function(x, *args, pre_scale), expected)


def composed(x, weight, scale, bias):
    """The layer in the operators of a quantized program, the product in float64."""
    ops, block = torch.ops.fxopt, [1, -1]
    token_scale, zero_point = ops.choose_qparams(x, block, False, -128, 127)
    q = ops.quantize(x, token_scale, zero_point, block, torch.int8, -128, 127)
    rows = ops.dequantize(q, token_scale.double(), zero_point, block, torch.float64)
    return rows @ (weight.double() * scale.double()[:, None]).T + bias.double()


def assert_composed(run, x, weight, scale, bias):
    expected = composed(x, weight, scale, bias)
    y = run(NAME, x, weight, scale, row_sums(weight), bias, "none")
    # One rounding to the dtype of x, and those of the float32 epilogue.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[x.dtype]
    reach = (expected - bias).abs() + bias.abs()
    assert ((y.double() - expected).abs() <= bound * reach + 1e-30).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize("k", [1, 33, 576, 1537])
def test_asymmetric_is_the_composition(run, m, k, dtype):
    weight, scale, bias = weight_of(70, k)
    for shift in (-3.0, 0.0, 0.4, 50.0):
        x = (torch.randn(m, k) + shift).to(dtype)
        assert_composed(run, x, weight, scale, bias)


@given(
    st.integers(1, 40).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=k, max_size=k),
            min_size=1,
            max_size=12,
        )
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_asymmetric_rows_of_any_floats(native, rows):
    x = torch.tensor(rows)
    weight, scale, _ = weight_of(5, x.size(1))
    args = (x, weight, scale, row_sums(weight), None, "none")
    assert torch.equal(OP(*args), dynamic_linear_w8a8(*args))
    q, token_scale, zero_point = quantize_rows(x, asymmetric=True)
    expected = torch.ops.fxopt.choose_qparams(x, [1, -1], False, -128, 127)
    assert torch.equal(token_scale, expected[0])
    assert torch.equal(zero_point, expected[1])
    wanted = torch.ops.fxopt.quantize(x, *expected, [1, -1], torch.int8, -128, 127)
    assert torch.equal(q, wanted)


def test_asymmetric_rows_of_denormals_keep_their_zero_point_in_range(native):
    x = torch.tensor([[-190.0, 5.0, 0.0, 190.0]]) * 2.0**-149
    weight, scale, _ = weight_of(5, 4)
    args = (x, weight, scale, row_sums(weight), None, "none")
    assert torch.equal(OP(*args), dynamic_linear_w8a8(*args))
    q, token_scale, zero_point = quantize_rows(x, asymmetric=True)
    assert token_scale.item() == torch.finfo(torch.float32).tiny
    assert -128 <= zero_point.item() <= 127
    assert q[0, 2] == zero_point


def test_asymmetric_rows_that_are_constant(run):
    weight, scale, bias = weight_of(70, 33)
    for value in (0.0, 1.0, -2.5, 1e-45, -1e-40, 1e36):
        x = torch.full((12, 33), value)
        assert_composed(run, x, weight, scale, bias)
    zero = run(NAME, torch.zeros(12, 33), weight, scale, row_sums(weight), bias, "none")
    assert torch.equal(zero, bias.expand(12, 70))


def test_asymmetric_halves_the_error_of_positive_rows(run):
    weight, scale, _ = weight_of(96, 576)
    x = torch.rand(40, 576)
    y = x @ (weight * scale[:, None]).T
    errors = [
        (run(NAME, x, weight, scale, total, None, "none") - y).square().mean()
        for total in (None, row_sums(weight))
    ]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 5, 300])
def test_activations(run, m, activation):
    weight, scale, bias = weight_of(131, 64)
    x = torch.randn(m, 64)
    for total, each in product((None, row_sums(weight)), (bias, None)):
        expected = dynamic_linear_w8a8(x, weight, scale, total, each, activation)
        assert_close(NAME, run(NAME, x, weight, scale, total, each, activation), expected)


def test_close_to_the_floating_layer(run):
    weight, scale, bias = weight_of(96, 576)
    x = torch.randn(40, 576)
    y = x @ (weight * scale[:, None]).T + bias
    error = run(NAME, x, weight, scale, None, bias, "none") - y
    assert error.square().mean() < 1e-4 * y.square().mean()


def test_token_permutation_and_one_row_at_a_time(run):
    weight, scale, bias = weight_of(70, 90)
    x = torch.randn(30, 90)
    y = run(NAME, x, weight, scale, None, bias, "gelu")
    order = torch.randperm(30)
    assert torch.equal(run(NAME, x[order], weight, scale, None, bias, "gelu"), y[order])
    alone = torch.cat([run(NAME, row, weight, scale, None, bias, "gelu") for row in x.split(1)])
    assert_close(NAME, alone, y)


@pytest.mark.parametrize("m", [4, 40])
def test_nan_stays_in_its_row(run, m):
    weight, scale, bias = weight_of(70, 33)
    x = torch.randn(m, 33)
    x[1, 5], x[2, 6], x[3, 7] = float("nan"), float("inf"), -float("inf")
    for total in (None, row_sums(weight)):
        y = run(NAME, x, weight, scale, total, bias, "none")
        assert y.isfinite().all(1).tolist() == [True, False, False, False] + [True] * (m - 4)
        assert y[1:4].isnan().all()
    huge = torch.tensor([[3e38, -3e38]]).expand(m, 2)  # their distance is infinite
    weight, scale, bias = weight_of(70, 2)
    assert run(NAME, huge, weight, scale, row_sums(weight), bias, "none").isnan().all()


def test_zero_rows_give_the_bias(run):
    weight, scale, bias = weight_of(70, 33)
    y = run(NAME, torch.zeros(12, 33), weight, scale, None, bias, "none")
    assert torch.equal(y, bias.expand(12, 70))


def test_float64_is_accepted(run):
    weight, scale, bias = weight_of(7, 33)
    x = torch.randn(3, 33, dtype=torch.float64)
    y = run(NAME, x, weight, scale, None, bias, "none")
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, dynamic_linear_w8a8(x, weight, scale, None, bias, "none"))


def test_refusals(run):
    weight, scale, bias = weight_of(7, 33)
    x = torch.randn(3, 33)
    with pytest.raises(KernelError, match="unknown activation 'tanh'; valid: none, relu, gelu"):
        run(NAME, x, weight, scale, None, bias, "tanh")
    with pytest.raises(KernelError, match="K = 32"):
        run(NAME, x[:, :32], weight, scale, None, bias, "none")
    with pytest.raises(KernelError, match="x must be float32"):
        run(NAME, x.int(), weight, scale, None, bias, "none")
    with pytest.raises(KernelError, match="got a scalar"):
        run(NAME, x[0, 0], weight, scale, None, bias, "none")
    for total in (row_sums(weight)[1:], row_sums(weight).long()):
        with pytest.raises(KernelError, match="weight_sum must be int32 with N = 7 elements"):
            run(NAME, x, weight, scale, total, bias, "none")
    for wrong in (torch.ones(1), torch.ones(32), torch.ones(34)):
        with pytest.raises(KernelError, match="pre_scale must have 33 elements, got"):
            run(NAME, x, weight, scale, None, bias, "none", wrong)
    with pytest.raises(KernelError, match="pre_scale must be float32, bfloat16"):
        run(NAME, x, weight, scale, None, bias, "none", torch.ones(33, dtype=torch.int8))
    with pytest.raises(KernelError, match="weight must be int8"):
        run(NAME, x, weight.float(), scale, None, bias, "none")


def test_opcheck(native):
    weight, scale, bias = weight_of(7, 33)
    torch.library.opcheck(OP, (torch.randn(2, 3, 33), weight, scale, None, bias, "relu"))
    total = row_sums(weight)
    torch.library.opcheck(OP, (torch.randn(3, 33).bfloat16(), weight, scale, total, None, "none"))
    torch.library.opcheck(
        OP, (torch.randn(3, 33), weight, scale, total, None, "none", pre_scale_of(33))
    )


def test_it_compiles_with_a_dynamic_batch(native):
    weight, scale, bias = weight_of(8, 16)

    def layer(x):
        return OP(x * 2, weight, scale, None, bias, "gelu") + 1

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    for m in (2, 5, 17):
        x = torch.randn(m, 16)
        assert torch.equal(compiled(x), layer(x))
