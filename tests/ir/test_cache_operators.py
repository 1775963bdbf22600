"""The cache operators: what they store, how far it is off, and that tokens are quantized once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import InputError, LoadError
from fxopt.ir.operators.cache import TOKEN_FORMATS
from fxopt.ir.signature import CacheSpec
from fxopt.ir.state_form import StateForm

ops = torch.ops.fxopt
HEADS, WIDTH, GROUP, WINDOW = 2, 8, 4, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN = [StateForm("int8"), StateForm("fp8_e4m3"), StateForm("fp8")]
GROUPED = [
    StateForm(dtype, GROUP, WINDOW, per_channel)
    for dtype in ("int4", "int2")
    for per_channel in (True, False)
]
seeds = st.integers(0, 10_000)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with outliers, some channels far from zero, -0 and denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.where(torch.rand(shape, generator=generator) < 0.05, 20, 1)
    x = x + 5 * torch.randn(shape[-1], generator=generator)
    kind = torch.rand(shape, generator=generator)
    return torch.where(kind < 0.02, -0.0, torch.where(kind < 0.04, x * 1e-40, x)).to(dtype)


def empty(form: StateForm, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A state without tokens."""
    if not form.dtype:
        return [torch.empty(batch, HEADS, 0, WIDTH, dtype=dtype)]
    if not form.bits:
        held = TOKEN_FORMATS[form.dtype].storage
        shapes = [((0, WIDTH), held), ((0, 1), dtype)]
    else:
        per_channel = form.per_channel
        scale = (0, WINDOW // GROUP, WIDTH) if per_channel else (0, WINDOW, WIDTH // GROUP)
        packed = (0, WINDOW, WIDTH * form.bits // 8)
        shapes = [(packed, torch.uint8), (scale, dtype), (scale, dtype), ((0, WIDTH), dtype)]
    return [torch.empty(batch, HEADS, *shape, dtype=kind) for shape, kind in shapes]


def read(form: StateForm, state: list[Tensor], new: Tensor) -> Tensor:
    if form.bits:
        return ops.cache_read_group(*state, new, form.bits, form.per_channel)
    return ops.cache_read_token(*state, new) if form.dtype else torch.cat([state[0], new], 2)


def recall(form: StateForm, state: list[Tensor], like: Tensor) -> Tensor:
    """The old tokens as attention reads them."""
    return read(form, state, like[:, :, :0])


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits_of(x), bits_of(y)) for x, y in zip(a, b, strict=True))


# --- how far off ----------------------------------------------------------------------------


@given(st.sampled_from(TOKEN), st.sampled_from(DTYPES), seeds, st.integers(1, 5))
def test_a_token_is_off_by_half_a_step_at_most(form, dtype, seed, length):
    x = numbers(seed, 2, HEADS, length, WIDTH, dtype=dtype)
    state = form.append(empty(form, 2, dtype), x)
    found, wide = recall(form, state, x).double(), x.double()
    step = state[1].double()
    # A float8 number has three bits after the first: its own step is 1/8 of its power of two.
    half = step / 2 if form.dtype == "int8" else (wide.abs() / 16).clamp(min=step * 2**-10)
    slack = wide.abs() * torch.finfo(dtype).eps + step * 127 * torch.finfo(dtype).eps
    assert ((found - wide).abs() <= half + slack).all()


@given(st.sampled_from(GROUPED), st.sampled_from(DTYPES), seeds, st.integers(1, 3))
def test_a_block_is_off_by_half_a_step_at_most(form, dtype, seed, blocks):
    x = numbers(seed, 2, HEADS, blocks * WINDOW, WIDTH, dtype=dtype)
    state = form.append(empty(form, 2, dtype), x)
    assert state[3].shape[2] == 0
    found = recall(form, state, x).double().unflatten(2, (blocks, WINDOW))
    axis = 3 if form.per_channel else 4
    step = state[1].double().repeat_interleave(GROUP, axis)
    wide = x.double().unflatten(2, (blocks, WINDOW))
    eps = torch.finfo(dtype).eps
    slack = eps * (wide.abs() + found.abs() + step * (1 << form.bits))
    assert ((found - wide).abs() <= step / 2 + slack).all()


@given(st.sampled_from(GROUPED), st.sampled_from(DTYPES), seeds)
def test_a_constant_channel_or_token_is_exact(form, dtype, seed):
    axis = 2 if form.per_channel else 3
    x = numbers(seed, 2, HEADS, WINDOW, WIDTH, dtype=dtype)
    x = x.narrow(axis, 0, 1).expand(x.shape)
    assert torch.equal(recall(form, form.append(empty(form, 2, dtype), x), x), x)


@given(st.sampled_from(DTYPES), seeds, st.integers(1, 5))
def test_no_scale_of_the_eight_is_nearer_to_a_token_in_float8(dtype, seed, length):
    form, x = StateForm("fp8_e4m3"), numbers(seed, 2, HEADS, length, WIDTH, dtype=dtype)
    values, scale = form.append(empty(form, 2, dtype), x)
    wide = x.double()
    error = (values.double() * scale.double() - wide).square().sum(-1)
    for step in range(8):
        tried = (x.float().abs().amax(-1, keepdim=True) / 448 * 2 ** (step / 8)).to(dtype).double()
        rounded = (wide / tried).clamp(-448, 448).to(torch.float8_e4m3fn).double() * tried
        # Where two scales are alike, float32 may take the other one.
        assert (error <= (rounded - wide).square().sum(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_float8_number_is_read_as_torch_reads_it(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()].view(1, 1, -1, 2)
    scale, new = torch.ones(1, 1, codes.shape[2], 1, dtype=dtype), torch.empty(1, 1, 0, 2).to(dtype)
    found = ops.cache_read_token(codes, scale, new)
    assert torch.equal(found, codes.to(dtype))
    assert torch.equal(found.signbit(), codes.to(dtype).signbit())


@pytest.mark.parametrize("form", TOKEN, ids=StateForm.describe)
def test_a_token_with_a_nan_is_read_as_nan_and_no_other_is(form):
    x = numbers(0, 1, HEADS, 3, WIDTH)
    x[0, 1, 1, 4] = float("nan")
    found = recall(form, form.append(empty(form, 1), x), x).isnan()
    assert found[0, 1, 1].all()
    assert int(found.sum()) == WIDTH


def test_half_steps_of_int8_go_to_the_even_neighbour():
    ties = torch.arange(-4, 3) + 0.5
    x = torch.cat([ties, torch.tensor([127.0])]).expand(1, HEADS, 1, WIDTH)
    values, scale = StateForm("int8").append(empty(StateForm("int8"), 1), x)
    assert bool((scale == 1).all())
    assert values[0, 0, 0, :-1].tolist() == [-4, -2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("form", GROUPED, ids=StateForm.describe)
def test_half_steps_of_groups_go_to_the_even_neighbour(form):
    """A group of four from 0 to the largest code, so that a step is 1."""
    largest = (1 << form.bits) - 1
    group = torch.tensor([0.0, 0.5, 1.5, float(largest)])
    along = group.repeat(2)
    x = along[:, None].expand(WINDOW, WIDTH) if form.per_channel else along.expand(WINDOW, WIDTH)
    x = x.expand(1, HEADS, WINDOW, WIDTH)
    found = recall(form, form.append(empty(form, 1), x), x)
    expected = torch.tensor([0.0, 0.0, 2.0, float(largest)]).repeat(2)
    shown = expected[:, None] if form.per_channel else expected
    assert torch.equal(found, shown.expand(found.shape))


@given(st.sampled_from(TOKEN), seeds, st.integers(-8, 8))
def test_signs_and_powers_of_two_change_no_more_than_themselves(form, seed, power):
    x = numbers(seed, 1, HEADS, 3, WIDTH)
    values, scale = form.append(empty(form, 1), x)
    opposite, same_scale = form.append(empty(form, 1), -x)
    assert torch.equal(opposite.float(), -values.float())
    assert torch.equal(same_scale, scale)
    same_values, larger = form.append(empty(form, 1), x * 2.0**power)
    assert torch.equal(same_values.float(), values.float())
    assert torch.equal(larger, scale * 2.0**power)


@pytest.mark.parametrize("form", [*TOKEN, *GROUPED], ids=StateForm.describe)
def test_zeros_are_exact(form):
    x = torch.zeros(1, HEADS, WINDOW, WIDTH)
    assert torch.equal(recall(form, form.append(empty(form, 1), x), x), x)


@pytest.mark.parametrize("form", GROUPED, ids=StateForm.describe)
def test_scales_of_fewer_bits_stay_finite(form):
    x = numbers(0, 1, HEADS, WINDOW, WIDTH) * 1e6
    state = form.append([t.half() if t.dtype == torch.float32 else t for t in empty(form, 1)], x)
    assert state[1].dtype == state[2].dtype == torch.float16
    assert torch.isfinite(recall(form, state, x)).all()


# --- tokens are quantized once --------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([StateForm(), *TOKEN, *GROUPED]), seeds, st.lists(st.integers(0, 19)))
def test_a_cache_filled_step_by_step_is_the_one_filled_at_once(form, seed, steps):
    x = numbers(seed, 2, HEADS, sum(steps), WIDTH)
    state = empty(form, 2)
    for part in x.split(steps, 2) if steps else []:
        state = form.append(state, part)
        assert form.length(state) <= x.shape[2]
    assert same(state, form.append(empty(form, 2), x))
    assert form.length(state) == x.shape[2]


@settings(max_examples=60)
@given(st.sampled_from(GROUPED), seeds, st.integers(0, 30), st.integers(0, 9))
def test_the_newest_tokens_are_exact_and_the_new_ones_too(form, seed, old, count):
    x = numbers(seed, 1, HEADS, old + count, WIDTH)
    state = form.append(empty(form, 1), x[:, :, :old])
    found = read(form, state, x[:, :, old:])
    assert found.shape == x.shape
    exact = old // WINDOW * WINDOW
    assert state[3].shape[2] == old - exact
    assert torch.equal(found[:, :, exact:], x[:, :, exact:])
    assert old < WINDOW or not torch.equal(found[:, :, :exact], x[:, :, :exact])


@pytest.mark.parametrize("form", [*TOKEN, *GROUPED], ids=StateForm.describe)
def test_rows_do_not_share_a_scale(form):
    x = numbers(1, 2, HEADS, 2 * WINDOW + 3, WIDTH)
    x[1] *= 1000
    both = form.append(empty(form, 2), x)
    for row in range(2):
        alone = form.append(empty(form, 1), x[row : row + 1])
        assert same([tensor[row : row + 1] for tensor in both], alone)


@pytest.mark.parametrize("form", [*TOKEN, *GROUPED], ids=StateForm.describe)
def test_no_tensor_keeps_the_memory_of_another_alive(form):
    state = form.append(empty(form, 1), numbers(0, 1, HEADS, 2 * WINDOW + 3, WIDTH))
    for tensor in form.append(state, numbers(1, 1, HEADS, 9, WIDTH)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# --- shapes ---------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([*TOKEN, *GROUPED]),
    st.sampled_from(DTYPES),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_fake_tensors_have_the_real_shapes(form, dtype, old, count):
    state = form.append(empty(form, 2, dtype), numbers(0, 2, HEADS, old, WIDTH, dtype=dtype))
    new = numbers(1, 2, HEADS, count, WIDTH, dtype=dtype)
    real = [read(form, state, new), *form.append(state, new)]
    with FakeTensorMode() as mode:
        state, new = [mode.from_tensor(t) for t in state], mode.from_tensor(new)
        fake = [read(form, state, new), *form.append(state, new)]
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


# --- going back, and plain data -------------------------------------------------------------


@pytest.mark.parametrize("form", [StateForm(), *TOKEN], ids=StateForm.describe)
def test_a_state_by_token_goes_back_to_any_length(form):
    x = numbers(0, 1, HEADS, 9, WIDTH)
    whole, part = form.append(empty(form, 1), x), form.append(empty(form, 1), x[:, :, :4])
    assert same(form.first(whole, 4), part)


@pytest.mark.parametrize("form", GROUPED, ids=StateForm.describe)
def test_a_state_in_blocks_goes_back_within_its_residual(form):
    x = numbers(0, 1, HEADS, WINDOW + 5, WIDTH)
    whole = form.append(empty(form, 1), x)
    shorter = form.append(empty(form, 1), x[:, :, : WINDOW + 2])
    assert same(form.first(whole, WINDOW + 2), shorter)
    with pytest.raises(InputError, match="only the newest 5 are in floating point"):
        form.first(whole, WINDOW - 1)


@pytest.mark.parametrize("form", [StateForm(), *TOKEN, *GROUPED], ids=StateForm.describe)
def test_a_form_is_plain_data(form):
    assert StateForm.from_dict(form.to_dict()) == form
    spec = CacheSpec(2, (form,) * 4)
    assert CacheSpec.from_dict(spec.to_dict()) == spec
    assert spec.count == 4 * len(form.parts)


@pytest.mark.parametrize(
    "damage",
    [{"dtype": "int3"}, {"group": 0}, {"window": "8"}, {"per_channel": 1}],
)
def test_a_damaged_form_is_refused(damage):
    with pytest.raises(LoadError, match="damaged"):
        StateForm.from_dict({**GROUPED[0].to_dict(), **damage})


def test_as_many_forms_as_states():
    with pytest.raises(LoadError, match="2 layers and 3 forms"):
        CacheSpec.from_dict({"layers": 2, "forms": [TOKEN[0].to_dict()] * 3})
    assert CacheSpec.from_dict({"layers": 2}).to_dict() == {"layers": 2}
