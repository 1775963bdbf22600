import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.activation import activation_function
from fxopt.kernels.gated_activation.reference import gated_activation
from tests.kernels.cases import ACTIVATIONS, DTYPE_IDS, FLOATING, strided
from tests.kernels.tolerances import ACTIVATION_ERROR, assert_close

NAME = "gated_activation"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (0, 7), (4, 0), (2, 3, 1100), (70, 96)])
def test_agreement_with_the_reference(native, shape, activation, dtype):
    gate, up = torch.randn(2, *shape).to(dtype)
    expected = gated_activation(gate, up, activation)
    assert_close(NAME, OP(gate, up, activation), expected)
    assert_close(NAME, OP(strided(gate), strided(up), activation), expected)


def test_halves_of_one_tensor(native):
    gate, up = torch.randn(3, 4, 140).chunk(2, -1)
    assert_close(NAME, OP(gate, up, "silu"), gated_activation(gate, up, "silu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate(native, activation):
    x = torch.cat((torch.linspace(-30, 30, 400_001), torch.tensor([-1e4, -1e30, 1e4, 1e30])))
    exact = activation_function(activation)(x.double())
    error = (OP(x, torch.ones_like(x), activation).double() - exact).abs()
    assert (error / x.double().abs().clamp_min(1.0)).max() <= ACTIVATION_ERROR


def test_tails_are_exact(native):
    x = torch.tensor([-1e30, -100.0, -30.0, 30.0, 100.0, 1e30]).repeat(7)
    y = OP(x, torch.ones_like(x), "gelu")
    assert torch.equal(y, x.clamp_min(0.0))
    # The sigmoid stops at exp(-80), so a trace of x remains.
    for activation in ("silu", "gelu_tanh", "quick_gelu"):
        z = OP(x, torch.ones_like(x), activation)
        assert torch.equal(z[x > 0], x[x > 0])
        assert (z[(x < 0) & (x > -1e3)].abs() < 1e-9).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(run, activation):
    gate = torch.randn(2, 40)
    gate[1, 3] = float("nan")
    y = run(NAME, gate, torch.ones_like(gate), activation)
    assert y.isnan().sum() == 1
    assert y[1, 3].isnan()


def test_float64(run):
    gate, up = torch.randn(2, 5, 70, dtype=torch.float64)
    for activation in ACTIVATIONS:
        expected = activation_function(activation)(gate) * up
        torch.testing.assert_close(
            run(NAME, gate, up, activation), expected, rtol=1e-12, atol=1e-12
        )


def test_refusals(run):
    gate = torch.randn(3, 5)
    with pytest.raises(KernelError, match="unknown activation 'mish'; valid: none, relu"):
        run(NAME, gate, gate, "mish")
    with pytest.raises(KernelError, match="gate and up must have one shape and dtype"):
        run(NAME, gate, gate[:2], "silu")
    with pytest.raises(KernelError, match="gate and up must have one shape and dtype"):
        run(NAME, gate, gate.double(), "silu")


def test_opcheck(native):
    gate, up = torch.randn(3, 4, 14).chunk(2, -1)
    torch.library.opcheck(OP, (gate, up, "silu"))
