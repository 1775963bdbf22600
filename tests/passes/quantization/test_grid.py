"""Grids: values are rounded to the nearest of what a format holds, block by block."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ir.number_formats import FORMATS
from fxopt.passes.quantization.grid import choose_grid, encode_by_rows, sum_blocks
from fxopt.passes.quantization.options import WeightOptions

SHAPES = [
    ((6, 16), {"granularity": "tensor"}),
    ((6, 16), {"granularity": "channel"}),
    ((6, 16), {"granularity": "group", "group_size": 4}),
    ((6, 16), {"granularity": "block", "block_size": (2, 8)}),
    ((1, 1), {"granularity": "channel"}),
    ((0, 8), {"granularity": "channel"}),
]
seeds = st.integers(0, 10_000)
formats = st.sampled_from(sorted(FORMATS))
shapes = st.sampled_from(SHAPES)


def weight(seed: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with outliers, zeros of both signs, zero rows and denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 14, shape, generator=generator)
    x = torch.where(kind == 0, 0.0, x)
    x = torch.where(kind == 1, -0.0, x)
    x = torch.where(kind == 2, x * 20, x)
    x = torch.where(kind == 3, x * 1e-40, x)
    if shape[0] > 2:
        x[1] = 0
        x[2] = 0.7
    return x.to(dtype)


@settings(max_examples=120, deadline=None)
@given(dtype=formats, case=shapes, seed=seeds, bf16=st.booleans())
def test_values_go_to_the_nearest_of_the_grid(dtype, case, seed, bf16):
    shape, options = case
    x = weight(seed, shape, torch.bfloat16 if bf16 else torch.float32)
    chosen = WeightOptions(dtype, **options)
    grid = choose_grid(x, chosen)
    codes = grid.encode(x)
    assert codes.dtype == FORMATS[dtype].storage
    back = grid.decode(codes)
    assert bool(torch.isfinite(back).all())
    scale = spread(grid.scale, x)
    near = (back / scale).double()
    allowed = all_values(dtype)
    distances = ((x.double() / scale.double())[..., None] - allowed).abs().amin(-1)
    mine = (x.double() / scale.double() - near).abs()
    assert bool((mine <= distances + 1e-5 * (1 + near.abs())).all())


def spread(parameter: Tensor, x: Tensor) -> Tensor:
    for axis in (0, 1):
        repeats = x.shape[axis] // parameter.shape[axis] if parameter.shape[axis] else 1
        parameter = parameter.repeat_interleave(repeats, axis)
    return parameter


def all_values(dtype: str) -> Tensor:
    """Every value that a format holds, in units of the scale."""
    found = FORMATS[dtype]
    if found.kind == "codebook":
        return found.codebook().double()
    if found.kind == "integer":
        return torch.arange(-found.high, found.high + 1, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(found.storage).double()
    return every[every.isfinite()]


@settings(max_examples=60, deadline=None)
@given(dtype=formats, case=shapes, seed=seeds, bf16=st.booleans())
def test_rounding_twice_changes_nothing(dtype, case, seed, bf16):
    shape, options = case
    x = weight(seed, shape, torch.bfloat16 if bf16 else torch.float32)
    grid = choose_grid(x, WeightOptions(dtype, **options))
    once = grid.round(x)
    assert once.dtype == x.dtype
    assert torch.equal(grid.encode(once), grid.encode(x))
    assert torch.equal(grid.round(once), once)


@settings(max_examples=60, deadline=None)
@given(dtype=formats, case=shapes, seed=seeds, bf16=st.booleans())
def test_signs_and_powers_of_two_go_through(dtype, case, seed, bf16):
    """Zeros of both signs and denormals too; times four they are not denormals of the same bits."""
    shape, options = case
    x = weight(seed, shape, torch.bfloat16 if bf16 else torch.float32)
    chosen = WeightOptions(dtype, **options)
    plain = choose_grid(x, chosen).round(x)
    if FORMATS[dtype].kind != "codebook":  # nf4 has one more value below zero than above
        assert torch.equal(choose_grid(-x, chosen).round(-x), -plain)
    normal = torch.where(x.abs() < 1e-3, 1e-3, x)
    plain = choose_grid(normal, chosen).round(normal)
    assert torch.equal(choose_grid(4 * normal, chosen).round(4 * normal), 4 * plain)


@settings(max_examples=80, deadline=None)
@given(dtype=formats, case=shapes, seed=seeds, bf16=st.booleans())
def test_nothing_is_clipped_and_errors_are_half_a_step_at_most(dtype, case, seed, bf16):
    shape, options = case
    x = weight(seed, shape, torch.bfloat16 if bf16 else torch.float32)
    grid = choose_grid(x, WeightOptions(dtype, **options))
    scale = spread(grid.scale, x).double()
    reach = 1.0 if FORMATS[dtype].kind == "codebook" else FORMATS[dtype].high
    assert bool((x.double().abs() <= reach * scale * (1 + 1e-6)).all())
    values = all_values(dtype).unique()
    steps = (x.double() / scale).clamp(values[0], values[-1])
    above = torch.searchsorted(values, steps.contiguous()).clamp(1, len(values) - 1)
    half = (values[above] - values[above - 1]) / 2
    error = (grid.round(x.float()).double() / scale - x.double() / scale).abs()
    assert bool((error <= half + 1e-5 * (1 + steps.abs())).all())


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(["int8", "int4", "int3", "int2"]), case=shapes, seed=seeds)
def test_asymmetric_ranges_hold_zero_and_err_by_half_a_step(dtype, case, seed):
    shape, options = case
    x = weight(seed, shape) + 2
    x[x.abs() < 1] = 0
    grid = choose_grid(x, WeightOptions(dtype, symmetric=False, **options))
    back = grid.round(x)
    assert grid.zero_point.dtype == torch.int8
    assert bool((back[x == 0] == 0).all())
    assert bool(((back - x).abs() <= 0.501 * spread(grid.scale, x)).all())


@settings(max_examples=40, deadline=None)
@given(dtype=formats, case=shapes, seed=seeds)
def test_the_mse_range_never_errs_more(dtype, case, seed):
    shape, options = case
    x = weight(seed, shape)
    plain = choose_grid(x, WeightOptions(dtype, **options))
    best = choose_grid(x, WeightOptions(dtype, range="mse", **options))
    block = plain.block
    errors = [sum_blocks((grid.round(x) - x).square(), block) for grid in (best, plain)]
    assert bool((errors[0] <= errors[1]).all())


def test_the_mse_range_clips_an_outlier():
    x = torch.cat(
        [torch.randn(1, 63, generator=torch.Generator().manual_seed(0)), torch.full((1, 1), 6.0)], 1
    )
    plain = choose_grid(x, WeightOptions("int3"))
    best = choose_grid(x, WeightOptions("int3", range="mse"))
    assert float(best.scale) < 0.95 * float(plain.scale)


def test_slabs_of_rows_are_the_whole():
    x = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0))
    for options in (WeightOptions("int4", "block", block_size=(7, 64)), WeightOptions("nf4")):
        grid = choose_grid(x, options)
        assert torch.equal(encode_by_rows(grid, x), grid.encode(x))
        parts = [choose_grid(x[i : i + 7], options).scale for i in range(0, 700, 7)]
        assert torch.equal(grid.scale, torch.cat(parts))


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_floating_formats_saturate(dtype):
    x = torch.tensor([[1e-3, 1.0, -3.0, 1e4, -1e4]])
    back = choose_grid(x, WeightOptions(dtype)).round(x)
    assert bool(torch.isfinite(back).all())
    assert math.isclose(float(back[0, 3]), 1e4, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
def test_half_steps_go_to_the_even_neighbour(dtype):
    high = FORMATS[dtype].high
    ties = torch.arange(-high, high) + 0.5
    x = torch.cat([ties, torch.tensor([float(high)])])[None]
    grid = choose_grid(x, WeightOptions(dtype))
    assert float(grid.scale) == 1
    codes = grid.encode(x)[0, :-1].int()
    assert bool((codes % 2 == 0).all())
    assert bool(((codes - ties).abs() == 0.5).all())


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
def test_with_a_zero_point_the_steps_are_even_and_not_the_codes(dtype):
    """x / s is rounded first, whatever the zero point: -3 q_max + 1 .. q_max has an odd one."""
    low, high = FORMATS[dtype].low, FORMATS[dtype].high
    first = low + 1  # the range [first, first + levels] puts the zero point to -1
    ties = torch.arange(first, first + high - low) + 0.5
    x = torch.cat([torch.tensor([float(first)]), ties, torch.tensor([float(first + high - low)])])
    grid = choose_grid(x[None], WeightOptions(dtype, symmetric=False))
    assert (float(grid.scale), int(grid.zero_point)) == (1, -1)
    steps = grid.encode(x[None])[0, 1:-1].int() + 1
    assert bool((steps % 2 == 0).all())
    assert bool(((steps - ties).abs() == 0.5).all())


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_ties_of_floating_formats_go_to_the_even_mantissa(dtype):
    held = FORMATS[dtype].storage
    values = torch.arange(0x7F, dtype=torch.uint8).view(held).float()
    values = values[values.isfinite()]
    ties, largest = (values[1:] + values[:-1]) / 2, values[-1:]
    x = torch.cat([ties, -ties, largest])[None]
    grid = choose_grid(x, WeightOptions(dtype))
    assert float(grid.scale) == 1
    codes = grid.encode(x)[0, :-1].view(torch.uint8)
    assert bool((codes % 2 == 0).all())
    assert torch.equal((grid.decode(grid.encode(x))[0, :-1] - x[0, :-1]).abs(), gaps(values))


def gaps(values: Tensor) -> Tensor:
    """Half of the distance between neighbours, for ties of both signs."""
    half = (values[1:] - values[:-1]) / 2
    return torch.cat([half, half])


def test_ties_of_a_table_go_to_the_lower_value():
    table = FORMATS["nf4"].codebook()
    middles = (table[1:] + table[:-1]) / 2
    x = torch.cat([middles, torch.tensor([1.0])])[None]
    codes = choose_grid(x, WeightOptions("nf4")).encode(x)[0, :-1]
    assert torch.equal(codes.int(), torch.arange(len(middles), dtype=torch.int32))
