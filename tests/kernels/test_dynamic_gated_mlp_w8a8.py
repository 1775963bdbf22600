import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import dynamic_gated_mlp_w8a8
from tests.kernels.cases import ACTIVATIONS, DTYPE_IDS, FLOATING, strided, weight_of
from tests.kernels.tolerances import assert_close

NAME = "dynamic_gated_mlp_w8a8"
OP = KERNELS[NAME].overload


def block(k, f, n, *, biased=True):
    up, down = weight_of(2 * f, k), weight_of(n, f)
    return (*up, *down) if biased else (*up[:2], None, *down[:2], None)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("lead", "k", "f", "n"),
    [
        ((1,), 1, 1, 1),
        ((1, 1), 576, 1536, 576),
        ((3,), 5, 7, 9),
        ((0, 2), 8, 8, 8),
        ((2, 7), 66, 33, 65),
        ((40,), 70, 100, 64),
        ((1030,), 24, 40, 20),
        ((4,), 6, 0, 5),
    ],
)
def test_agreement_with_the_reference(run, lead, k, f, n, dtype):
    parameters = block(k, f, n)
    x = torch.randn(*lead, k).to(dtype)
    expected = dynamic_gated_mlp_w8a8(x, *parameters, "silu")
    for each in (x, strided(x)):
        assert_close(NAME, run(NAME, each, *parameters, "silu"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [2, 20])
def test_activations_without_bias(run, m, activation):
    parameters = block(48, 70, 30, biased=False)
    x = torch.randn(m, 48)
    expected = dynamic_gated_mlp_w8a8(x, *parameters, activation)
    assert_close(NAME, run(NAME, x, *parameters, activation), expected)


def test_close_to_the_floating_block(run):
    up, up_scale, up_bias, down, down_scale, down_bias = block(96, 128, 80)
    x = torch.randn(50, 96)
    gate, lift = (x @ (up * up_scale[:, None]).T + up_bias).chunk(2, -1)
    hidden = activation_function("silu")(gate) * lift
    y = hidden @ (down * down_scale[:, None]).T + down_bias
    error = run(NAME, x, up, up_scale, up_bias, down, down_scale, down_bias, "silu") - y
    assert error.square().mean() < 1e-3 * y.square().mean()


def test_nan_stays_in_its_row(run):
    parameters = block(24, 40, 20)
    x = torch.randn(14, 24)
    x[3, 3] = float("nan")
    y = run(NAME, x, *parameters, "silu")
    assert y[3].isnan().all()
    assert y[torch.arange(14) != 3].isfinite().all()


def test_refusals(run):
    parameters = block(24, 40, 20)
    x = torch.randn(2, 24)
    with pytest.raises(KernelError, match="unknown activation 'elu'; valid:"):
        run(NAME, x, *parameters, "elu")
    odd = (parameters[0][:79], parameters[1][:79], None, *parameters[3:])
    with pytest.raises(KernelError, match="the gate rows and then as many up rows"):
        run(NAME, x, *odd, "silu")
    shorter = [parameters[0][:78], parameters[1][:78], None]
    with pytest.raises(KernelError, match="K = 39"):
        run(NAME, x, *shorter, *parameters[3:], "silu")


def test_opcheck(native):
    torch.library.opcheck(OP, (torch.randn(2, 3, 24), *block(24, 40, 20), "silu"))
    torch.library.opcheck(OP, (torch.randn(3, 24), *block(24, 4, 2, biased=False), "gelu"))
