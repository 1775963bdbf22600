import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.fused_rms_norm.reference import fused_rms_norm
from tests.kernels.cases import DTYPE_IDS, FLOATING, strided
from tests.kernels.tolerances import assert_close

NAME = "fused_rms_norm"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 7), (4, 0), (2, 3, 129), (70, 576), (9,)])
def test_agreement_with_the_reference(native, shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    for gain in (weight, weight.to(dtype), None):
        expected = fused_rms_norm(x, gain, 1e-5)
        assert_close(NAME, OP(x, gain, 1e-5), expected)
        assert_close(NAME, OP(strided(x), gain, 1e-5), expected)


def test_it_is_torch_in_float64(run):
    x, weight = torch.randn(5, 70, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    expected = torch.rms_norm(x, (70,), weight, 1e-6)
    torch.testing.assert_close(run(NAME, x, weight, 1e-6), expected, rtol=1e-12, atol=1e-12)


@given(st.floats(0.01, 100.0), st.integers(1, 60))
@settings(deadline=None)
def test_scale_invariance(native, factor, width):
    x = torch.randn(3, width, dtype=torch.float64)
    y = OP(x, None, 0.0)
    torch.testing.assert_close(OP(x * factor, None, 0.0), y)
    mean_square = y.square().mean(-1)
    torch.testing.assert_close(mean_square, torch.ones_like(mean_square))


def test_nan_stays_in_its_row(run):
    x = torch.randn(3, 70)
    x[1, 69] = float("nan")
    assert run(NAME, x, None, 1e-5).isnan().all(1).tolist() == [False, True, False]


def test_refusals(run):
    with pytest.raises(KernelError, match="weight must have 5 elements"):
        run(NAME, torch.randn(3, 5), torch.randn(4), 1e-5)
    with pytest.raises(KernelError, match="x must be float32"):
        run(NAME, torch.ones(3, 5, dtype=torch.int32), None, 1e-5)


def test_opcheck(native):
    torch.library.opcheck(OP, (torch.randn(2, 3, 7), torch.randn(7), 1e-5))
    torch.library.opcheck(OP, (torch.randn(3, 7).bfloat16(), None, 1e-5))
