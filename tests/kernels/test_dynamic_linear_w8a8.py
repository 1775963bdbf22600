import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.dynamic_linear_w8a8.reference import dynamic_linear_w8a8
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    LINEAR_SHAPES,
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
    x = torch.randn(*lead, k).to(dtype)
    expected = dynamic_linear_w8a8(x, weight, scale, bias, "silu")
    for each in (x, strided(x)):
        assert_close(NAME, run(NAME, each, weight, scale, bias, "silu"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 5, 300])
def test_activations(run, m, activation):
    weight, scale, bias = weight_of(131, 64)
    x = torch.randn(m, 64)
    for each in (bias, None):
        expected = dynamic_linear_w8a8(x, weight, scale, each, activation)
        assert_close(NAME, run(NAME, x, weight, scale, each, activation), expected)


def test_close_to_the_floating_layer(run):
    weight, scale, bias = weight_of(96, 576)
    x = torch.randn(40, 576)
    y = x @ (weight * scale[:, None]).T + bias
    error = run(NAME, x, weight, scale, bias, "none") - y
    assert error.square().mean() < 1e-4 * y.square().mean()


def test_token_permutation_and_one_row_at_a_time(run):
    weight, scale, bias = weight_of(70, 90)
    x = torch.randn(30, 90)
    y = run(NAME, x, weight, scale, bias, "gelu")
    order = torch.randperm(30)
    assert torch.equal(run(NAME, x[order], weight, scale, bias, "gelu"), y[order])
    alone = torch.cat([run(NAME, row, weight, scale, bias, "gelu") for row in x.split(1)])
    assert_close(NAME, alone, y)


@pytest.mark.parametrize("m", [4, 40])
def test_nan_stays_in_its_row(run, m):
    weight, scale, bias = weight_of(70, 33)
    x = torch.randn(m, 33)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    y = run(NAME, x, weight, scale, bias, "none")
    assert y.isfinite().all(1).tolist() == [True, False, False] + [True] * (m - 3)
    assert y[1:3].isnan().all()


def test_zero_rows_give_the_bias(run):
    weight, scale, bias = weight_of(70, 33)
    y = run(NAME, torch.zeros(12, 33), weight, scale, bias, "none")
    assert torch.equal(y, bias.expand(12, 70))


def test_float64_is_accepted(run):
    weight, scale, bias = weight_of(7, 33)
    x = torch.randn(3, 33, dtype=torch.float64)
    y = run(NAME, x, weight, scale, bias, "none")
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, dynamic_linear_w8a8(x, weight, scale, bias, "none"))


def test_refusals(run):
    weight, scale, bias = weight_of(7, 33)
    x = torch.randn(3, 33)
    with pytest.raises(KernelError, match="unknown activation 'tanh'; valid: none, relu, gelu"):
        run(NAME, x, weight, scale, bias, "tanh")
    with pytest.raises(KernelError, match="K = 32"):
        run(NAME, x[:, :32], weight, scale, bias, "none")
    with pytest.raises(KernelError, match="x must be float32"):
        run(NAME, x.int(), weight, scale, bias, "none")
    with pytest.raises(KernelError, match="got a scalar"):
        run(NAME, x[0, 0], weight, scale, bias, "none")
    with pytest.raises(KernelError, match="weight must be int8"):
        run(NAME, x, weight.float(), scale, bias, "none")


def test_opcheck(native):
    weight, scale, bias = weight_of(7, 33)
    torch.library.opcheck(OP, (torch.randn(2, 3, 33), weight, scale, bias, "relu"))
    torch.library.opcheck(OP, (torch.randn(3, 33).bfloat16(), weight, scale, None, "none"))


def test_it_compiles_with_a_dynamic_batch(native):
    weight, scale, bias = weight_of(8, 16)

    def layer(x):
        return OP(x * 2, weight, scale, bias, "gelu") + 1

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    for m in (2, 5, 17):
        x = torch.randn(m, 16)
        assert torch.equal(compiled(x), layer(x))
