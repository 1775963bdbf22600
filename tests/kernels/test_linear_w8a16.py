import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.linear_w8a16.reference import linear_w8a16
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    LINEAR_SHAPES,
    strided,
    weight_of,
)
from tests.kernels.tolerances import assert_close

NAME = "linear_w8a16"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_agreement_with_the_reference(native, lead, k, n, dtype):
    weight, scale, bias = weight_of(n, k)
    x = torch.randn(*lead, k).to(dtype)
    expected = linear_w8a16(x, weight, scale, bias, "gelu")
    for each in (x, strided(x)):
        assert_close(NAME, OP(each, weight, scale, bias, "gelu"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 6, 20, 40])
def test_activations(native, m, activation):
    weight, scale, bias = weight_of(131, 64)
    x = torch.randn(m, 64)
    for each in (bias, None):
        expected = linear_w8a16(x, weight, scale, each, activation)
        assert_close(NAME, OP(x, weight, scale, each, activation), expected)


def test_large_float16_does_not_overflow(native):
    weight = torch.full((3, 512), 127, dtype=torch.int8)
    scale = torch.full((3,), 1e-3)
    for m in (2, 20, 40):
        x = torch.full((m, 512), 8.0, dtype=torch.float16)
        y = OP(x, weight, scale, None, "none")
        assert_close(NAME, y, linear_w8a16(x, weight, scale, None, "none"))


def test_blocks_of_rows_and_columns(native):
    weight, scale, bias = weight_of(1500, 1000)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1100, 1000).to(dtype)
        expected = linear_w8a16(x, weight, scale, bias, "none")
        assert_close(NAME, OP(x, weight, scale, bias, "none"), expected)


@pytest.mark.parametrize("m", [2, 20, 40])
def test_nan_stays_in_its_row(native, m):
    weight, scale, bias = weight_of(70, 33)
    x = torch.randn(m, 33)
    x[1, 5] = float("nan")
    y = OP(x, weight, scale, bias, "none")
    assert y[1].isnan().all()
    assert y[torch.arange(m) != 1].isfinite().all()


def test_refusals(run):
    weight, scale, bias = weight_of(7, 33)
    x = torch.randn(3, 33)
    with pytest.raises(KernelError, match="unknown activation 'tanh'; valid: none, relu, gelu"):
        run(NAME, x, weight, scale, bias, "tanh")
    with pytest.raises(KernelError, match="K = 32"):
        run(NAME, x[:, :32], weight, scale, bias, "none")
    with pytest.raises(KernelError, match="x must be float32"):
        run(NAME, x.int(), weight, scale, bias, "none")


def test_opcheck(native):
    weight, scale, bias = weight_of(7, 33)
    torch.library.opcheck(OP, (torch.randn(2, 3, 33), weight, scale, bias, "relu"))
    torch.library.opcheck(OP, (torch.randn(40, 33).bfloat16(), weight, scale, None, "none"))
