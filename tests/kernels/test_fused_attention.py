import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.fused_attention.reference import fused_attention
from tests.kernels.cases import DTYPE_IDS, FLOATING, strided
from tests.kernels.tolerances import assert_close

NAME = "fused_attention"
OP = KERNELS[NAME].overload


def heads_of(b, h, s, d, dtype=torch.float32):
    """Heads as a linear layer leaves them: memory [B, S, H, D] seen as [B, H, S, D]."""
    return torch.randn(b, s, h, d).to(dtype).transpose(1, 2)


def in_float64(args):
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]


def check(*args):
    """The operator against its reference in float64."""
    y = OP(*args)
    expected = fused_attention(*in_float64(args)).to(y.dtype)
    assert y.transpose(1, 2).is_contiguous()
    dense = torch.contiguous_format
    assert_close(NAME, y.clone(memory_format=dense), expected.clone(memory_format=dense))
    return y


# (B, H, Hkv, S, T, D)
SHAPES = [
    (1, 9, 3, 1, 600, 64),
    (2, 4, 4, 1, 1, 8),
    (2, 6, 2, 5, 70, 80),
    (1, 5, 1, 8, 1030, 32),
    (2, 4, 2, 40, 40, 64),
    (1, 2, 2, 20, 133, 7),
    (2, 3, 1, 9, 4, 32),
    (1, 2, 1, 3, 1, 64),
    (1, 1, 1, 17, 17, 128),
]


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_structured_masks(native, shape, dtype):
    b, h, kv, s, t, d = shape
    q, k, v = (
        heads_of(b, h, s, d, dtype),
        heads_of(b, kv, t, d, dtype),
        heads_of(b, kv, t, d, dtype),
    )
    some = torch.rand(b, t) > 0.3
    none = some.clone()
    none[0] = False
    for causal, window, padding in product(
        (False, True), (None, 1, 3, 64, t + s + 5), (None, some, none, some.long() | 1)
    ):
        check(q, k, v, padding, None, None, d**-0.5, causal, window, None)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinks_and_softcap(native, shape, dtype):
    b, h, kv, s, t, d = shape
    q, k, v = (
        heads_of(b, h, s, d, dtype),
        heads_of(b, kv, t, d, dtype),
        heads_of(b, kv, t, d, dtype),
    )
    padding = torch.rand(b, t) > 0.3
    for causal, sinks, softcap in product(
        (False, True), (None, torch.randn(h), torch.randn(h).to(dtype)), (None, 2.0, 50.0)
    ):
        check(q, k, v, padding, None, sinks, d**-0.5, causal, 40, softcap)


@pytest.mark.parametrize("broadcast", list(product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("steps", [2, 21])
def test_explicit_masks(native, steps, broadcast):
    sizes = (2, 6, steps, 70)
    q, k, v = heads_of(2, 6, steps, 32), heads_of(2, 2, 70, 32), heads_of(2, 2, 70, 32)
    padding = torch.rand(2, 70) > 0.3
    shape = [1 if single else size for single, size in zip(broadcast, sizes, strict=True)]
    additive = torch.randn(shape)
    boolean = additive > -0.5
    partly = additive.masked_fill(~boolean, -math.inf)
    for mask, causal, kept, cap in product(
        (additive, boolean, partly), (False, True), (None, padding), (None, 9.0)
    ):
        check(q, k, v, kept, mask, None, 0.2, causal, None, cap)
    check(q, k, v, None, strided(additive), None, 0.2, False, None, None)
    check(q, k, v, None, additive[0], None, 0.2, True, None, None)


@given(
    group=st.integers(1, 5),
    s=st.integers(1, 40),
    t=st.integers(1, 700),
    d=st.sampled_from([1, 8, 31, 32, 64, 80]),
    causal=st.booleans(),
    window=st.none() | st.integers(-1, 800),
    padded=st.booleans(),
    softcap=st.none() | st.floats(0.5, 60.0),
    sinks=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_combination(native, group, s, t, d, causal, window, padded, softcap, sinks):
    q, k, v = heads_of(2, 2 * group, s, d), heads_of(2, 2, t, d), heads_of(2, 2, t, d)
    padding = torch.rand(2, t) > 0.5 if padded else None
    sink = torch.randn(2 * group) if sinks else None
    check(q, k, v, padding, None, sink, d**-0.5, causal, window, softcap)


@pytest.mark.parametrize("steps", [1, 6, 30])
def test_layouts(native, steps):
    q, k, v = torch.randn(2, 6, steps, 32), torch.randn(2, 3, 90, 32), torch.randn(2, 3, 90, 48)
    cache = torch.randn(2, 3, 200, 32)[:, :, 50:140]
    fused = torch.randn(2, 90, 3, 96).transpose(1, 2)
    for keys, values in ((k, v), (strided(k), strided(v)), (cache, v), fused.split((32, 64), -1)):
        for queries in (q, strided(q), q[:, :1].expand(2, 6, steps, 32)):
            for causal in (False, True):
                check(queries, keys, values, None, None, None, 0.2, causal, None, None)


def test_empty(native):
    q, k, v = heads_of(2, 4, 3, 8), heads_of(2, 2, 0, 8), heads_of(2, 2, 0, 8)
    assert OP(q, k, v, None, None, None, 1.0, True, None, None).eq(0).all()
    none = heads_of(0, 4, 3, 8)
    assert OP(none, none, none, None, None, None, 1.0, True, None, None).shape == (0, 4, 3, 8)


def test_rows_that_see_no_key_are_zero(native):
    q, k, v = heads_of(2, 4, 3, 8), heads_of(2, 2, 20, 8), heads_of(2, 2, 20, 8)
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1] = False
    for causal in (False, True):
        y = check(q, k, v, padding, None, None, 0.3, causal, None, None)
        assert y[1].eq(0).all()
        assert y[0].ne(0).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_splitting_keys_among_threads(native, threads):
    torch.set_num_threads(threads)
    for t in (127, 128, 1000, 2049):
        q, k, v = heads_of(1, 5, 1, 64), heads_of(1, 1, t, 64), heads_of(1, 1, t, 64)
        padding = torch.arange(t)[None] >= t // 2  # a whole split is hidden
        for kept, sinks in product((None, padding), (None, torch.randn(5))):
            check(q * 5, k, v, kept, None, sinks, 0.2, True, None, None)


@pytest.mark.parametrize("steps", [2, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_reaches_what_sees_it(native, steps, causal):
    q, k, v = heads_of(1, 2, steps, 16), heads_of(1, 1, 600, 16), heads_of(1, 1, 600, 16)
    bad = q.clone()
    bad[0, 1, 0] = math.nan
    y = OP(bad, k, v, None, None, None, 0.2, causal, None, None)
    assert y[0, 1, 0].isnan().all()
    assert y.isnan().sum() == 16
    last = v.clone()
    last[0, 0, 599, 3] = math.nan
    y = OP(q, k, last, None, None, None, 0.2, causal, None, None)
    assert y[0, :, -1, 3].isnan().all()
    assert y[..., :3].isfinite().all()
    keys = k.clone()
    keys[0, 0, 3] = math.nan
    assert OP(q, keys, v, None, None, None, 0.2, causal, None, None).isnan().all()


def test_large_scores_do_not_overflow(native):
    q, k, v = heads_of(1, 3, 2, 16), heads_of(1, 1, 600, 16), heads_of(1, 1, 600, 16)
    check(q * 100, k * 100, v, None, None, None, 1.0, True, None, None)
    mask = torch.full((1, 1, 1, 600), torch.finfo(torch.float32).min)
    mask[..., 550:] = 0
    check(q, k, v, None, mask, None, 1.0, False, None, None)


def test_float64_is_the_reference(native):
    args = (*in_float64([heads_of(1, 4, 3, 8), heads_of(1, 2, 9, 8), heads_of(1, 2, 9, 8)]),)
    args = (*args, None, None, None, 0.3, True, 4, 5.0)
    assert torch.equal(OP(*args), fused_attention(*args))


def test_refusals(native):
    q, k, v = heads_of(2, 4, 3, 8), heads_of(2, 2, 9, 8), heads_of(2, 2, 9, 8)
    plain = (None, None, None, 1.0, False, None, None)
    with pytest.raises(KernelError, match=r"must be \[B, H, S, D\]"):
        OP(q[0], k, v, *plain)
    with pytest.raises(KernelError, match="the heads of q must be a multiple"):
        OP(q[:, :3], k, v, *plain)
    with pytest.raises(KernelError, match="do not fit each other"):
        OP(q[..., :4], k, v, *plain)
    with pytest.raises(KernelError, match="must have one dtype"):
        OP(q, k.bfloat16(), v, *plain)
    with pytest.raises(KernelError, match=r"padding must be \[B, T\] = \[2, 9\]"):
        OP(q, k, v, torch.ones(2, 8), *plain[1:])
    with pytest.raises(KernelError, match="sinks must have H = 4"):
        OP(q, k, v, None, None, torch.ones(3), *plain[3:])
    with pytest.raises(KernelError, match="mask must be float32"):
        OP(q, k, v, None, torch.ones(3, 9).int(), *plain[2:])


def test_opcheck(native):
    q, k, v = heads_of(2, 4, 3, 8), heads_of(2, 2, 9, 8), heads_of(2, 2, 9, 8)
    padding = torch.rand(2, 9) > 0.2
    torch.library.opcheck(OP, (q, k, v, padding, None, None, 0.3, True, 4, None))
    torch.library.opcheck(
        OP, (q, k, v, None, torch.randn(3, 9), torch.randn(4), 0.3, False, 4, 5.0)
    )
    long = heads_of(1, 2, 20, 8)
    torch.library.opcheck(OP, (long, long, long, None, None, None, 0.3, False, None, None))


def test_it_compiles_with_a_dynamic_length(native):
    def layer(q, k, v):
        return OP(q * 2, k, v, None, None, None, 0.3, True, None, None).transpose(1, 2).flatten(2)

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    for t in (5, 17, 40):
        q, k, v = heads_of(2, 4, 3, 8), heads_of(2, 2, t, 8), heads_of(2, 2, t, 8)
        assert torch.equal(compiled(q, k, v), layer(q, k, v))
