import pytest
import torch
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.add_layer_norm.reference import add_layer_norm
from tests.kernels.cases import DTYPE_IDS, FLOATING, strided
from tests.kernels.tolerances import assert_close

NAME = "add_layer_norm"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (0, 7), (4, 0), (2, 3, 129), (70, 384), (9,)])
def test_agreement_with_the_reference(native, shape, dtype):
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    expected = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert_close(NAME, OP(x, residual, weight, bias, 1e-5), expected)
    assert_close(NAME, OP(strided(x), strided(residual), weight, bias, 1e-5), expected)


def test_it_is_torch_in_float64(run):
    x, residual = torch.randn(2, 5, 70, dtype=torch.float64)
    weight, bias = torch.randn(2, 70, dtype=torch.float64)
    expected = functional.layer_norm(x + residual, (70,), weight, bias, 1e-6)
    actual = run(NAME, x, residual, weight, bias, 1e-6)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_nan_stays_in_its_row(run):
    x, residual = torch.randn(2, 3, 70)
    residual[1, 69] = float("nan")
    y = run(NAME, x, residual, torch.ones(70), torch.zeros(70), 1e-5)
    assert y.isnan().all(1).tolist() == [False, True, False]


def test_refusals(run):
    x, ones = torch.randn(3, 5), torch.ones(5)
    with pytest.raises(KernelError, match="x and residual must have one shape and dtype"):
        run(NAME, x, x[:2], ones, ones, 1e-5)
    with pytest.raises(KernelError, match="bias must have 5 elements"):
        run(NAME, x, x, ones, ones[:4], 1e-5)


def test_opcheck(native):
    x, residual = torch.randn(2, 3, 4, 7)
    torch.library.opcheck(OP, (x, residual, torch.randn(7), torch.randn(7), 1e-5))
