"""`range: output`: each block has the range that harms the output least, of those tried."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.passes.quantization.grid import (
    _SHRINK,
    choose_grid,
    output_loss,
)
from fxopt.passes.quantization.options import WeightOptions
from tests.passes.quantization.test_gptq import problem

OUTPUTS, INPUTS = 6, 16
BLOCKS = [
    ({"granularity": "channel"}, (1, 16)),
    ({"granularity": "group", "group_size": 4}, (1, 4)),
    ({"granularity": "block", "block_size": (2, 8)}, (2, 8)),
    ({"granularity": "tensor"}, (6, 16)),
]
dtypes = st.sampled_from(["int8", "int4", "int3", "int2", "nf4", "fp8_e4m3"])
cases = st.sampled_from(BLOCKS)
seeds = st.integers(0, 10_000)


def harm(weight: Tensor, rounded: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """|| X (W - Q)^T ||^2 of each block by itself, float64."""
    rows, columns = block
    found = torch.empty(weight.shape[0] // rows, weight.shape[1] // columns, dtype=torch.float64)
    for i, j in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        difference = weight[part].double() - rounded[part].double()
        found[i, j] = (x[:, part[1]].double() @ difference.T).square().sum()
    return found


def options_of(dtype: str, symmetric: bool, granularity: dict) -> WeightOptions:
    symmetric = symmetric or not dtype.startswith("int")
    return WeightOptions(dtype, symmetric=symmetric, range="output", **granularity)


@settings(max_examples=60, deadline=None)
@given(dtype=dtypes, case=cases, seed=seeds)
def test_the_loss_is_the_error_of_the_output(dtype, case, seed):
    granularity, block = case
    weight, x = problem(seed, inputs=INPUTS, outputs=OUTPUTS)
    chosen = options_of(dtype, True, granularity)
    rounded = choose_grid(weight, WeightOptions(dtype, **granularity)).round(weight)
    found = output_loss(x.double().T @ x.double(), chosen.block)(weight, rounded)
    expected = harm(weight, rounded, x, block)
    assert found.shape == expected.shape
    floor = 1e-6 * float(expected.max()) + 1e-12
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=floor)


@settings(max_examples=60, deadline=None)
@given(dtype=dtypes, case=cases, symmetric=st.booleans(), seed=seeds)
def test_no_range_that_is_tried_harms_the_output_less(dtype, case, symmetric, seed):
    granularity, block = case
    weight, x = problem(seed, inputs=INPUTS, outputs=OUTPUTS)
    chosen = options_of(dtype, symmetric, granularity)
    found = choose_grid(weight, chosen, output_loss(x.double().T @ x.double(), chosen.block))
    mine = harm(weight, found.round(weight), x, block)
    plain = choose_grid(weight, WeightOptions(dtype, symmetric=chosen.symmetric, **granularity))
    every = [dataclasses.replace(plain, scale=plain.scale * share) for share in _SHRINK]
    least = torch.stack([harm(weight, grid.round(weight), x, block) for grid in every]).amin(0)
    slack = 1e-3 * least + 1e-6 * float(least.max()) + 1e-12
    assert bool((mine <= least + slack).all())
    squares = choose_grid(
        weight, WeightOptions(dtype, symmetric=chosen.symmetric, range="mse", **granularity)
    )
    for grid in (plain, squares):
        assert bool((mine <= harm(weight, grid.round(weight), x, block) + slack).all())


def test_it_is_not_the_range_of_least_squared_error():
    """What large inputs meet decides: 6 is kept where its input is large, clipped where small."""
    weight = torch.cat([torch.linspace(-1, 1, 15), torch.tensor([6.0])])[None]
    energy = torch.ones(16)
    chosen = WeightOptions("int3", range="output")
    scales = []
    for size in (10.0, 0.01):
        energy[-1] = size
        loss = output_loss(torch.diag(energy).double(), chosen.block)
        scales.append(float(choose_grid(weight, chosen, loss).scale))
    assert scales[0] > 1.5 * scales[1]
