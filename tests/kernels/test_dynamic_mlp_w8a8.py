from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.activation import activation_function
from fxopt.kernels.dynamic_linear_w8a8.reference import dynamic_linear_w8a8
from fxopt.kernels.dynamic_mlp_w8a8.reference import dynamic_mlp_w8a8
from tests.kernels.cases import (
    ACTIVATIONS,
    DTYPE_IDS,
    FLOATING,
    feed_forward_block,
    pre_scale_of,
    strided,
)
from tests.kernels.tolerances import assert_close

NAME = "dynamic_mlp_w8a8"
OP = KERNELS[NAME].overload


def block(k, f, n, **options):
    return feed_forward_block(k, f, f, n, **options)


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
        ((1030,), 24, 40, 20),
        ((4,), 6, 0, 5),
    ],
)
@SUMMED
def test_agreement_with_the_reference(run, lead, k, f, n, dtype, summed):
    parameters = block(k, f, n, summed=summed)
    x = torch.randn(*lead, k).to(dtype)
    expected = dynamic_mlp_w8a8(x, *parameters, "gelu")
    for each in (x, strided(x)):
        assert_close(NAME, run(NAME, each, *parameters, "gelu"), expected)


@given(
    st.integers(1, 900),
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(1, 70),
    st.sampled_from(ACTIVATIONS),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(deadline=None, max_examples=40)
def test_it_is_its_two_linears_to_the_bit(native, m, k, f, n, activation, flags):
    """However its rows are cut into tasks, and with the activation in memory or not."""
    *summed, scaled = flags
    up, up_scale, up_sum, up_bias, *down = parameters = block(k, f, n, summed=summed)
    scales = (pre_scale_of(k), pre_scale_of(f)) if scaled else (None, None)
    linear = KERNELS["dynamic_linear_w8a8"].overload
    x = torch.randn(m, k)
    hidden = linear(x, up, up_scale, up_sum, up_bias, activation, scales[0])
    expected = linear(hidden, *down, "none", scales[1])
    assert torch.equal(OP(x, *parameters, activation, *scales), expected)


@given(st.integers(2, 600), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=20)
def test_tokens_do_not_see_each_other(native, m, k, summed):
    """Permuted rows give permuted results, to the bit."""
    parameters = block(k, 30, 9, summed=(summed, summed))
    x = torch.randn(m, k)
    order = torch.randperm(m)
    assert torch.equal(OP(x[order], *parameters, "gelu"), OP(x, *parameters, "gelu")[order])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_split_among_threads_to_the_bit(native, threads):
    parameters = block(33, 65, 20, summed=(True, True))
    x = torch.randn(1501, 33)
    torch.set_num_threads(threads)
    y = OP(x, *parameters, "gelu")
    parts = [OP(part, *parameters, "gelu") for part in x.split(7)]
    assert torch.equal(y, torch.cat(parts))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [2, 20])
def test_activations_without_bias(run, m, activation):
    parameters = block(48, 70, 30, biased=False)
    x = torch.randn(m, 48)
    expected = dynamic_mlp_w8a8(x, *parameters, activation)
    assert_close(NAME, run(NAME, x, *parameters, activation), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@SUMMED
def test_what_lies_between_stays_in_float32(run, summed, dtype):
    up, up_scale, up_sum, up_bias, *down = parameters = block(33, 65, 9, summed=summed)
    x, scales = torch.randn(20, 33).to(dtype), (pre_scale_of(33), pre_scale_of(65))
    plain = dynamic_linear_w8a8(x.float() * scales[0], up, up_scale, up_sum, up_bias, "none")
    hidden = activation_function("gelu")(plain) * scales[1]
    expected = dynamic_linear_w8a8(hidden, *down, "none").to(dtype)
    args = (*parameters, "gelu", *scales)
    assert torch.equal(dynamic_mlp_w8a8(x, *args), expected)
    assert_close(NAME, run(NAME, x, *args), expected)


@SUMMED
def test_close_to_the_floating_block(run, summed):
    parameters = block(96, 128, 80, summed=summed)
    up, up_scale, _, up_bias, down, down_scale, _, down_bias = parameters
    x = torch.randn(50, 96)
    hidden = activation_function("gelu")(x @ (up * up_scale[:, None]).T + up_bias)
    y = hidden @ (down * down_scale[:, None]).T + down_bias
    error = run(NAME, x, *parameters, "gelu") - y
    assert error.square().mean() < 1e-3 * y.square().mean()


@SUMMED
def test_nan_stays_in_its_row(run, summed):
    parameters = block(24, 40, 20, summed=summed)
    x = torch.randn(14, 24)
    x[3, 3] = float("nan")
    y = run(NAME, x, *parameters, "gelu")
    assert y[3].isnan().all()
    assert y[torch.arange(14) != 3].isfinite().all()


def test_refusals(run):
    parameters = block(24, 40, 20)
    x = torch.randn(2, 24)
    with pytest.raises(KernelError, match="unknown activation 'elu'; valid:"):
        run(NAME, x, *parameters, "elu")
    with pytest.raises(KernelError, match=r"dynamic_mlp_w8a8 needs a tensor \[\.\.\., K\]"):
        run(NAME, torch.tensor(1.0), *parameters, "gelu")
    shorter = [parameters[0][:39], parameters[1][:39], None, None]
    with pytest.raises(KernelError, match="K = 39"):
        run(NAME, x, *shorter, *parameters[4:], "gelu")
    for index in (2, 6):
        wrong = [*parameters[:index], torch.ones(3, dtype=torch.int32), *parameters[index + 1 :]]
        with pytest.raises(KernelError, match="weight_sum must be int32"):
            run(NAME, x, *wrong, "gelu")
    for index, (name, width) in enumerate({"pre_scale": 24, "down_pre_scale": 40}.items()):
        with pytest.raises(KernelError, match=f"^{name} must have {width} elements"):
            run(NAME, x, *parameters, "gelu", *[None] * index, torch.ones(width + 1))


def test_opcheck(native):
    torch.library.opcheck(
        OP, (torch.randn(2, 3, 24), *block(24, 40, 20, summed=(True, True)), "gelu")
    )
    scaled = (*block(24, 4, 2), "gelu", pre_scale_of(24), pre_scale_of(4))
    torch.library.opcheck(OP, (torch.randn(3, 24), *scaled))
