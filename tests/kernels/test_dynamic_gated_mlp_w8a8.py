from itertools import product

import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_gated_mlp_w8a8.reference import dynamic_gated_mlp_w8a8
from fxopt.kernels.dynamic_linear_w8a8.reference import dynamic_linear_w8a8
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    feed_forward_block,
    pre_scale_of,
    strided,
)
from tests.kernels.tolerances import assert_close

NAME = "dynamic_gated_mlp_w8a8"
OP = KERNELS[NAME].overload


def block(k, f, n, **options):
    return feed_forward_block(k, 2 * f, f, n, **options)


SUMMED = pytest.mark.parametrize("summed", list(product((False, True), repeat=2)))


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
@SUMMED
def test_agreement_with_the_reference(run, lead, k, f, n, dtype, summed):
    parameters = block(k, f, n, summed=summed)
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


@SUMMED
def test_is_the_composition_of_its_linears(run, summed):
    up, up_scale, up_sum, up_bias, *down = parameters = block(65, 48, 30, summed=summed)
    x = torch.randn(20, 65) + 0.3
    both = run("dynamic_linear_w8a8", x, up, up_scale, up_sum, up_bias, "none")
    gate, lift = both.chunk(2, -1)
    hidden = run("gated_activation", gate, lift, "silu")
    expected = run("dynamic_linear_w8a8", hidden, *down, "none")
    assert_close(NAME, run(NAME, x, *parameters, "silu"), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("m", "k", "f", "n"), [(1, 576, 96, 64), (7, 33, 65, 9), (1030, 8, 40, 5)])
@SUMMED
def test_scales_per_channel_are_products_in_float32(run, m, k, f, n, summed, dtype):
    *up, down, down_scale, down_sum, down_bias = parameters = block(k, f, n, summed=summed)
    x, pre_scale, down_pre_scale = torch.randn(m, k).to(dtype), pre_scale_of(k), pre_scale_of(f)
    both = dynamic_linear_w8a8(x.float() * pre_scale, *up, "none")
    gate, lift = both.chunk(2, -1)
    hidden = activation_function("silu")(gate) * lift * down_pre_scale
    linear = (down, down_scale, down_sum, down_bias)
    expected = dynamic_linear_w8a8(hidden, *linear, "none").to(dtype)
    args = (*parameters, "silu", pre_scale, down_pre_scale)
    assert torch.equal(dynamic_gated_mlp_w8a8(x, *args), expected)
    for each in (x, strided(x)):
        assert_close(NAME, run(NAME, each, *args), expected)
    plain = run(NAME, x, *parameters, "silu", None, None)
    assert torch.equal(plain, run(NAME, x, *parameters, "silu"))


@SUMMED
def test_close_to_the_floating_block(run, summed):
    parameters = block(96, 128, 80, summed=summed)
    up, up_scale, _, up_bias, down, down_scale, _, down_bias = parameters
    x = torch.randn(50, 96)
    gate, lift = (x @ (up * up_scale[:, None]).T + up_bias).chunk(2, -1)
    hidden = activation_function("silu")(gate) * lift
    y = hidden @ (down * down_scale[:, None]).T + down_bias
    error = run(NAME, x, *parameters, "silu") - y
    assert error.square().mean() < 1e-3 * y.square().mean()


@SUMMED
def test_nan_stays_in_its_row(run, summed):
    parameters = block(24, 40, 20, summed=summed)
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
    odd = (parameters[0][:79], parameters[1][:79], None, None, *parameters[4:])
    with pytest.raises(KernelError, match="the gate rows and then as many up rows"):
        run(NAME, x, *odd, "silu")
    shorter = [parameters[0][:78], parameters[1][:78], None, None]
    with pytest.raises(KernelError, match="K = 39"):
        run(NAME, x, *shorter, *parameters[4:], "silu")
    for index in (2, 6):
        wrong = [*parameters[:index], torch.ones(3, dtype=torch.int32), *parameters[index + 1 :]]
        with pytest.raises(KernelError, match="weight_sum must be int32"):
            run(NAME, x, *wrong, "silu")
    scales = {"pre_scale": 24, "down_pre_scale": 40}
    for index, (name, width) in enumerate(scales.items()):
        for wrong, why in (
            (torch.ones(width + 1), f"^{name} must have {width} elements"),
            (torch.ones(width, dtype=torch.int32), f"^{name} must be float32"),
        ):
            with pytest.raises(KernelError, match=why):
                run(NAME, x, *parameters, "silu", *[None] * index, wrong)


def test_opcheck(native):
    torch.library.opcheck(
        OP, (torch.randn(2, 3, 24), *block(24, 40, 20, summed=(True, True)), "silu")
    )
    torch.library.opcheck(OP, (torch.randn(3, 24), *block(24, 4, 2, biased=False), "gelu"))
    scaled = (*block(24, 4, 2), "gelu", pre_scale_of(24), pre_scale_of(4))
    torch.library.opcheck(OP, (torch.randn(3, 24), *scaled))
