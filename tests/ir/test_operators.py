"""Properties of the `fxopt::` operators, against independent float64 computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt.ir.operators as operators
from fxopt.errors import KernelError

ops = torch.ops.fxopt
TINY = torch.finfo(torch.float32).tiny
SYMMETRIC, ASYMMETRIC = (True, -127, 127), (False, -128, 127)
MODES = (SYMMETRIC, ASYMMETRIC)
IDS = ("symmetric", "asymmetric")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (shape, block): every granularity, one row, one column, blocks of one element.
BLOCKS = [
    ((6, 8), (-1, -1)),
    ((6, 8), (1, -1)),
    ((6, 8), (1, 4)),
    ((6, 8), (2, 4)),
    ((6, 8), (3, 8)),
    ((6, 8), (1, 1)),
    ((1, 8), (1, -1)),
    ((6, 1), (-1, 1)),
    ((2, 3, 8), (1, 1, -1)),
    ((2, 3, 8), (-1, -1, -1)),
]
seeds = st.integers(0, 10_000)
# Magnitudes from denormal to large; fp16 ends at 65504.
exponents = st.integers(-46, 4)


def values(seed: int, *shape: int, exponent: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with outliers and zeros of both signs, scaled by a power of ten."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 12, shape, generator=generator)
    x = torch.where(kind == 0, 0.0, x)
    x = torch.where(kind == 1, -0.0, x)
    x = torch.where(kind == 2, x * 20, x)
    return (x * 10.0**exponent).clamp(-6e4, 6e4).to(dtype)


def round_trip(x: Tensor, block: tuple[int, ...], mode: tuple[bool, int, int]):
    """Scale, zero point (None if symmetric), integers and the values they stand for."""
    symmetric, low, high = mode
    scale, zero_point = ops.choose_qparams(x, block, symmetric, low, high)
    zero = None if symmetric else zero_point
    q = ops.quantize(x, scale, zero, block, torch.int8, low, high)
    return scale, zero, q, ops.dequantize(q, scale, zero, block, torch.float32)


def spread(parameter: Tensor, x: Tensor) -> Tensor:
    """One value per element out of one per block."""
    for axis in range(x.dim()):
        count = parameter.shape[axis]
        repeats = x.shape[axis] // count if count else 1
        parameter = parameter.repeat_interleave(repeats, axis)
    return parameter


# --- quantize and dequantize ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(BLOCKS), seed=seeds, exponent=exponents)
def test_error_is_at_most_half_a_step(mode, dtype, case, seed, exponent):
    shape, block = case
    x = values(seed, *shape, exponent=exponent, dtype=dtype)
    scale, zero, q, back = round_trip(x, block, mode)
    assert scale.dtype == torch.float32
    assert q.dtype == torch.int8
    assert bool((scale >= TINY).all())
    allowed = spread(scale, x).double() * (0.5 + 1e-4)
    assert bool(((back.double() - x.double()).abs() <= allowed).all())
    if zero is not None:
        assert bool(((zero >= -128) & (zero <= 127)).all())
    else:
        assert int(q.min()) >= -127


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(BLOCKS), seed=seeds, exponent=st.integers(-30, 3))
def test_the_scale_is_the_range_over_the_steps(mode, case, seed, exponent):
    """Tight too: a coarser scale would also keep the half-step bound."""
    shape, block = case
    x = values(seed, *shape, exponent=exponent)
    scale, _, _, _ = round_trip(x, block, mode)
    blocks = [n if size == -1 else size for n, size in zip(shape, block, strict=True)]
    counts = [n // size if size else 0 for n, size in zip(shape, blocks, strict=True)]
    assert list(scale.shape) == [1 if b == -1 else c for b, c in zip(block, counts, strict=True)]
    for index in torch.cartesian_prod(*(torch.arange(c) for c in scale.shape)).tolist():
        part = x
        for axis, (i, size) in enumerate(zip(index, blocks, strict=True)):
            part = part.narrow(axis, i * size, size)
        part = part.double()
        if mode is SYMMETRIC:
            expected = float(part.abs().max()) / 127
        else:
            expected = (max(float(part.max()), 0) - min(float(part.min()), 0)) / 255
        assert float(scale[tuple(index)]) == pytest.approx(max(expected, TINY), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=30, deadline=None)
@given(case=st.sampled_from(BLOCKS), seed=seeds, exponent=st.integers(-3, 3))
def test_quantizing_again_changes_nothing(mode, dtype, case, seed, exponent):
    shape, block = case
    x = values(seed, *shape, exponent=exponent, dtype=dtype)
    scale, zero, q, _ = round_trip(x, block, mode)
    back = ops.dequantize(q, scale, zero, block, dtype)
    assert back.dtype == dtype
    assert torch.equal(ops.quantize(back, scale, zero, block, torch.int8, *mode[1:]), q)


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(BLOCKS), seed=seeds, exponent=st.integers(-40, 4))
def test_symmetric_quantization_is_odd(case, seed, exponent):
    shape, block = case
    x = values(seed, *shape, exponent=exponent)
    scale, _, q, back = round_trip(x, block, SYMMETRIC)
    negated_scale, _, negated, negated_back = round_trip(-x, block, SYMMETRIC)
    assert torch.equal(scale, negated_scale)
    assert torch.equal(negated, -q)
    assert torch.equal(negated_back, -back)


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(BLOCKS), seed=seeds, offset=st.floats(-50, 50))
def test_zero_stays_exactly_zero(case, seed, offset):
    """Padding and masked entries must not turn into something."""
    shape, block = case
    x = values(seed, *shape) + offset
    x = torch.where(values(seed + 1, *shape) > 0.5, torch.zeros(()), x)
    for mode in MODES:
        back = round_trip(x, block, mode)[3]
        assert bool((back[x == 0] == 0).all())


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(seed=seeds, exponent=st.integers(-20, 4), offset=st.floats(-5, 5))
def test_quantization_is_monotone_and_keeps_its_ends(mode, seed, exponent, offset):
    x = (values(seed, 1, 40, exponent=exponent) + offset).sort().values
    scale, _, q, back = round_trip(x, (1, -1), mode)
    assert bool((q[0].int().diff() >= 0).all())
    step = float(scale)
    assert abs(float(back[0, -1] - x[0, -1])) <= 0.51 * step
    assert abs(float(back[0, 0] - x[0, 0])) <= 0.51 * step


@settings(max_examples=60, deadline=None)
@given(seed=seeds, exponent=st.integers(-20, 4), offset=st.floats(-5, 5))
def test_finer_blocks_never_have_a_larger_step(seed, exponent, offset):
    x = values(seed, 6, 8, exponent=exponent) + offset
    for symmetric, low, high in MODES:
        tensor, channel, group = (
            spread(ops.choose_qparams(x, block, symmetric, low, high)[0], x)
            for block in ([-1, -1], [1, -1], [1, 4])
        )
        assert bool((group <= channel).all())
        assert bool((channel <= tensor).all())


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_blocks_of_denormals_keep_to_the_range(mode):
    x = torch.tensor([[-190.0, 5.0, 0.0, 190.0]], dtype=torch.float64) * 2.0**-149
    scale, zero, _, back = round_trip(x.float(), (1, -1), mode)
    assert float((back.double() - x).abs().max()) <= 0.5001 * float(scale)
    assert float(back[0, 2]) == 0
    assert zero is None or -128 <= int(zero) <= 127


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_tokens_have_no_scales(mode, shape):
    block = (1,) * (len(shape) - 1) + (-1,)
    scale, _, q, back = round_trip(torch.empty(shape), block, mode)
    assert scale.shape == (*shape[:-1], 1)
    assert q.shape == back.shape == shape


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -126.5]])
    scale, _, q, _ = round_trip(x, (1, -1), SYMMETRIC)
    assert scale.tolist() == [[1.0]]
    assert q.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, -126]]
    # The zero point is added after rounding: an odd one must not turn the ties around.
    one = torch.ones(1, 1)
    odd = ops.quantize(x[:, 1:5], one, one.int(), [1, -1], torch.int8, -128, 127)
    assert odd.tolist() == [[1, 3, 3, 5]]


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -1.0, 3e-45, -1e-40, TINY, -TINY, 1e-30, 3.4e38, -3.4e38, 65504.0]
)
def test_constant_blocks(mode, value):
    x = torch.full((2, 4), value)
    for block in ((-1, -1), (1, -1), (1, 2)):
        scale, _, _, back = round_trip(x, block, mode)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        error = (back.double() - x.double()).abs().max()
        assert float(error) <= abs(value) * 1e-5 + TINY
        if value == 0:
            assert bool((back == 0).all())


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_show_in_the_scale_of_their_block_only(mode, dtype, bad):
    x = torch.ones(3, 4, dtype=dtype)
    x[1, 2] = bad
    scale = ops.choose_qparams(x, [1, -1], *mode)[0]
    assert scale.shape == (3, 1)
    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


def test_values_outside_the_range_are_clamped():
    x = torch.tensor([[-1000.0, -128.4, 0.0, 127.6, 1000.0]])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    q = ops.quantize(x, one, zero, [1, -1], torch.int8, -128, 127)
    assert q.tolist() == [[-128, -128, 0, 127, 127]]
    assert ops.quantize(x, one, None, [1, -1], torch.int8, -7, 7).tolist() == [[-7, -7, 0, 7, 7]]


def test_dequantize_without_a_zero_point_is_a_product():
    q = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).reshape(16, 16)
    scale = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    back = ops.dequantize(q, scale, None, [1, 4], torch.float32)
    assert torch.equal(back, q.float() * scale.repeat_interleave(4, 1))


def test_qparams_of_float64_are_float64():
    x = values(0, 4, 4).double()
    assert ops.choose_qparams(x, [1, -1], *SYMMETRIC)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "block", "message"),
    [
        ((4, 10), (1, 4), "choose a group size that divides 10"),
        ((5, 8), (2, 8), "divides 5"),
        ((4, 10), (1, 16), "divides 10"),
        ((4, 10), (-1,), "has 1 axes"),
        ((2, 4, 10), (1, -1), "has 2 axes"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(shape, block, message):
    x = torch.ones(shape)
    with pytest.raises(KernelError, match=message):
        ops.choose_qparams(x, block, *SYMMETRIC)
    with pytest.raises(KernelError, match=message):
        ops.quantize(x, torch.ones(1), None, block, torch.int8, -127, 127)


@pytest.mark.parametrize("weight_mode", MODES, ids=IDS)
@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=30, deadline=None)
@given(seed=seeds, m=st.integers(1, 5), n=st.integers(1, 5), k=st.integers(1, 40))
def test_the_integer_product_is_the_fake_quantized_one(mode, weight_mode, seed, m, n, k):
    """What every W8A8 kernel rests on, zero points of both sides included."""
    x, weight = values(seed, m, k) + 1.5, values(seed + 1, n, k) - 0.5
    x_scale, x_zero, qx, _ = round_trip(x, (1, -1), mode)
    w_scale, w_zero, qw, _ = round_trip(weight, (1, -1), weight_mode)
    x_scale, w_scale = x_scale.double(), w_scale.double()
    fake = ops.dequantize(qx, x_scale, x_zero, [1, -1], torch.float64) @ (
        ops.dequantize(qw, w_scale, w_zero, [1, -1], torch.float64).T
    )
    zx = torch.zeros(m, 1).long() if x_zero is None else x_zero.long()
    zw = torch.zeros(n, 1).long() if w_zero is None else w_zero.long()
    product = qx.long() @ qw.long().T
    product -= zx * qw.long().sum(1) + qx.long().sum(1, keepdim=True) * zw.T - k * zx * zw.T
    exact = product.double() * x_scale * w_scale.T
    size = float((x_scale * w_scale.T).max()) * 127 * 127 * k
    assert float((exact - fake).abs().max()) <= 1e-13 * size


# Blocks of an activation [m, 24] and of a weight [2 n, 24], and how wide they are.
ACTIVATION_BLOCKS = {
    "tensor": (-1, -1),
    "token": (1, -1),
    "embedding group": (-1, 4),
    "both": (1, 8),
}
WEIGHT_BLOCKS = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, 6), "block": (2, 12)}


@pytest.mark.parametrize("weight_mode", MODES, ids=IDS)
@pytest.mark.parametrize("mode", MODES, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    m=st.integers(1, 4),
    n=st.integers(1, 3),
    block=st.sampled_from(sorted(ACTIVATION_BLOCKS)),
    weight_block=st.sampled_from(sorted(WEIGHT_BLOCKS)),
)
def test_integer_products_of_any_blocks_add_up(mode, weight_mode, seed, m, n, block, weight_block):
    """Over inputs that share both scales the sum is one of integers; two scales are left."""
    x, weight = values(seed, m, 24) + 1.5, values(seed + 1, 2 * n, 24) - 0.5
    blocks = ACTIVATION_BLOCKS[block], WEIGHT_BLOCKS[weight_block]
    x_scale, x_zero, qx, _ = round_trip(x, blocks[0], mode)
    w_scale, w_zero, qw, _ = round_trip(weight, blocks[1], weight_mode)
    fake = ops.dequantize(qx, x_scale.double(), x_zero, blocks[0], torch.float64) @ (
        ops.dequantize(qw, w_scale.double(), w_zero, blocks[1], torch.float64).T
    )
    scales = spread(x_scale.double(), x), spread(w_scale.double(), weight)
    zeros = [
        torch.zeros_like(q).long() if zero is None else spread(zero.long(), q)
        for q, zero in ((qx, x_zero), (qw, w_zero))
    ]
    width = math.gcd(*(24 if sizes[1] == -1 else sizes[1] for sizes in blocks))
    total = torch.zeros(m, 2 * n, dtype=torch.float64)
    for first in range(0, 24, width):
        part = slice(first, first + width)
        a, b = qx[:, part].long(), qw[:, part].long()
        za, zb = zeros[0][:, first, None], zeros[1][:, first]
        product = a @ b.T - za * b.sum(1) - a.sum(1, keepdim=True) * zb + width * za * zb
        total += product.double() * scales[0][:, first, None] * scales[1][:, first]
    size = float(x_scale.max()) * float(w_scale.max()) * 255 * 255 * 24
    assert float((total - fake).abs().max()) <= 1e-13 * size


# --- attention ------------------------------------------------------------------------------


def plain_attention(q, k, v, visible, added, sinks, scale, softcap):
    """Row by row in float64: visible [B, S, T] of bool, added [B, H, S, T] or None."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            for i in range(length):
                scores = (k[b, kv] @ q[b, h, i]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if added is not None:
                    scores = scores + added[b, h, i]
                keys = [j for j in range(k.shape[2]) if visible[b, i, j]]
                keys = [j for j in keys if scores[j] > -math.inf]
                if not keys:
                    continue
                weights = torch.exp(scores[keys])
                total = weights.sum() + (math.exp(float(sinks[h])) if sinks is not None else 0)
                out[b, h, i] = (weights / total) @ v[b, kv][keys]
    return out


def visible_keys(batch, queries, keys, padding, causal, window):
    """The mask by its words in the docstring, one entry at a time."""
    visible = torch.ones(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                position = i + keys - queries
                hidden = (causal and j > position) or (
                    window is not None and not abs(position - j) < window
                )
                visible[b, i, j] = not hidden and (padding is None or bool(padding[b, j]))
    return visible


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    groups=st.integers(1, 3),
    queries=st.integers(1, 5),
    past=st.integers(0, 4),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 4)),
    padded=st.booleans(),
    sinks=st.booleans(),
    softcap=st.one_of(st.none(), st.floats(0.5, 30)),
    added=st.sampled_from(["none", "float", "bool"]),
)
def test_attention_is_what_its_arguments_say(
    seed, groups, queries, past, causal, window, padded, sinks, softcap, added
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, kv_heads, keys = 2, 2, queries + past
    q = random(batch, kv_heads * groups, queries, 4)
    k, v = random(batch, kv_heads, keys, 4), random(batch, kv_heads, keys, 6)
    padding = torch.rand(batch, keys, generator=generator) > 0.4 if padded else None
    sink = random(kv_heads * groups) if sinks else None
    mask = extra = None
    if added != "none":
        full = torch.rand(batch, kv_heads * groups, queries, keys, generator=generator) > 0.3
        lowered = torch.where(full, 0.0, -math.inf).double()
        extra = lowered if added == "bool" else lowered + random(*full.shape)
        mask = full if added == "bool" else extra
    visible = visible_keys(batch, queries, keys, padding, causal, window)
    expected = plain_attention(q, k, v, visible, extra, sink, 0.37, softcap)
    structured = ops.attention(q, k, v, padding, mask, sink, 0.37, causal, window, softcap)
    assert torch.allclose(structured, expected, rtol=1e-9, atol=1e-10)
    explicit = torch.where(visible[:, None], 0.0, -math.inf).double()
    explicit = explicit if extra is None else explicit + extra
    given_mask = ops.attention(q, k, v, None, explicit, sink, 0.37, False, None, softcap)
    assert torch.allclose(structured, given_mask, rtol=1e-9, atol=1e-10)


def test_attention_layout_and_dtype():
    q, k = torch.randn(2, 4, 3, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    for softcap in (None, 20.0):
        out = ops.attention(q, k, k, None, None, None, 0.3, True, None, softcap)
        assert out.dtype == torch.bfloat16
        assert out.transpose(1, 2).is_contiguous()
        visible = visible_keys(2, 3, 5, None, True, None)
        expected = plain_attention(q, k, k, visible, None, None, 0.3, softcap)
        assert float((out.double() - expected).abs().max()) < 0.05


def test_an_absent_mask_is_none():
    assert operators.attention_mask(3, 5, None, False, None, torch.device("cpu")) is None
    padding = torch.ones(2, 5)
    mask = operators.attention_mask(3, 5, padding, False, None, torch.device("cpu"))
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 1, 5)


# --- rope -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@settings(max_examples=40, deadline=None)
@given(seed=seeds, half=st.integers(1, 4), rest=st.integers(0, 5), length=st.integers(1, 5))
def test_rope_turns_complex_numbers(interleaved, seed, half, rest, length):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, length, 2 * half + rest, generator=generator, dtype=torch.float64)
    angle = torch.randn(2, 1, length, half, generator=generator, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    part, kept = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        turned = torch.view_as_real(torch.complex(part[..., ::2], part[..., 1::2]) * turn)
        turned, table = turned.flatten(-2), angle.repeat_interleave(2, -1)
    else:
        number = torch.complex(part[..., :half], part[..., half:]) * turn
        turned, table = torch.cat((number.real, number.imag), -1), torch.cat((angle, angle), -1)
    out = ops.rope(x, table.cos(), table.sin(), interleaved)
    assert torch.allclose(out, torch.cat((turned, kept), -1), rtol=1e-12, atol=1e-12)
    assert torch.equal(out[..., 2 * half :], kept)
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1))
    # Turning back is turning by the negative angle.
    assert torch.allclose(ops.rope(out, table.cos(), -table.sin(), interleaved), x)


def test_rope_promotes_like_torch():
    x, table = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 1, 3, 4)
    assert ops.rope(x, table, table, False).dtype == torch.float32
    assert ops.rope(x, table.bfloat16(), table.bfloat16(), False).dtype == torch.bfloat16


# --- mixture of experts ---------------------------------------------------------------------

FUNCTIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def test_every_activation_is_covered():
    assert set(FUNCTIONS) == set(operators.ACTIVATIONS)


@pytest.mark.parametrize("activation", operators.ACTIVATIONS)
def test_activations(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(operators.activate(x, activation), FUNCTIONS[activation](x), atol=1e-12)


def test_unknown_activations_are_named():
    with pytest.raises(KernelError, match=r"unknown activation 'swish'.*silu"):
        operators.activate(torch.ones(1), "swish")


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    tokens=st.integers(0, 6),
    experts=st.integers(1, 4),
    chosen=st.integers(1, 3),
    activation=st.sampled_from(operators.ACTIVATIONS),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_moe_is_a_loop_over_tokens(seed, tokens, experts, chosen, activation, gated, biased):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width, hidden = 5, 3
    x, weight = random(tokens, width), random(tokens, chosen)
    # One index beyond the experts stands for a token that is routed nowhere.
    index = torch.randint(0, experts + 1, (tokens, chosen), generator=generator)
    up = random(experts, 2 * hidden if gated else hidden, width)
    down = random(experts, width, hidden)
    up_bias = random(experts, up.shape[1]) if biased else None
    down_bias = random(experts, width) if biased else None
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for token in range(tokens):
        for choice in range(chosen):
            expert = int(index[token, choice])
            if expert == experts:
                continue
            h = up[expert] @ x[token] + (up_bias[expert] if biased else 0)
            h = (
                FUNCTIONS[activation](h[:hidden]) * h[hidden:]
                if gated
                else FUNCTIONS[activation](h)
            )
            y = down[expert] @ h + (down_bias[expert] if biased else 0)
            expected[token] += weight[token, choice] * y
    out = ops.moe(x, index, weight, up, down, up_bias, down_bias, activation, gated)
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-9)


def test_moe_keeps_the_dtype_of_its_input():
    x = torch.randn(4, 8).bfloat16()
    up, down = torch.randn(2, 6, 8).bfloat16(), torch.randn(2, 8, 3).bfloat16()
    index, weight = torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    out = ops.moe(x, index, weight, up, down, None, None, "silu", True)
    assert out.dtype == torch.bfloat16


# --- torch's own checks of an operator ------------------------------------------------------


def opcheck_cases():
    x = torch.randn(4, 6)
    scale, zero = torch.rand(4, 1) + 0.1, torch.ones(4, 1, dtype=torch.int32)
    group = torch.rand(4, 3) + 0.1
    q8 = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    padding, sinks = torch.ones(2, 5, dtype=torch.bool), torch.randn(4)
    mask = torch.randn(2, 1, 3, 5)
    table = torch.randn(2, 1, 3, 6)
    index, weight = torch.tensor([[0, 1], [2, 1], [1, 0]]), torch.rand(3, 2)
    up, down = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    for block in ([-1, -1], [1, -1], [1, 2], [2, 3]):
        yield ops.choose_qparams.default, (x, block, *SYMMETRIC)
        yield ops.choose_qparams.default, (x, block, *ASYMMETRIC)
    yield ops.choose_qparams.default, (torch.randn(2, 3, 4).bfloat16(), [1, 1, -1], *SYMMETRIC)
    yield ops.quantize.default, (x, scale, zero, [1, -1], torch.int8, -128, 127)
    yield ops.quantize.default, (x, group, None, [1, 2], torch.int8, -127, 127)
    yield ops.dequantize.default, (q8, scale, zero, [1, -1], torch.float32)
    yield ops.dequantize.default, (q8, group, None, [1, 2], torch.bfloat16)
    yield ops.attention.default, (q, k, k, None, None, None, 0.3, True, None, None)
    yield ops.attention.default, (q, k, k, padding, None, None, 0.3, True, 2, None)
    yield ops.attention.default, (q, k, k, None, mask, sinks, 0.3, False, None, 9.0)
    for interleaved in (False, True):
        yield ops.rope.default, (q, table, table, interleaved)
        yield ops.rope.default, (q.bfloat16(), table, table, interleaved)
    yield ops.hadamard.default, (torch.randn(2, 3, 24), 12)
    yield ops.hadamard.default, (torch.randn(3, 16).bfloat16().t().contiguous().t(), 4)
    yield ops.moe.default, (torch.randn(3, 6), index, weight, up, down, None, None, "silu", True)
    bias = (torch.randn(3, 4), torch.randn(3, 6))
    yield ops.moe.default, (torch.randn(3, 6), index, weight, up[:, :4], down, *bias, "relu", False)


@pytest.mark.parametrize(("operator", "arguments"), list(opcheck_cases()))
def test_opcheck_with_fixed_and_dynamic_shapes(operator, arguments):
    done = torch.library.opcheck(operator, arguments)
    assert set(done.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in done


@pytest.mark.parametrize(("operator", "arguments"), list(opcheck_cases()))
def test_fakes_tell_shape_stride_and_dtype(operator, arguments):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple | list) else [(real, fake)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
