import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import rms_norm
from fxopt.passes.canonicalize.rms_norm import norm_gain
from tests.graphs import Function, count, operators, relative_error, run
from tests.passes.canonicalize.rules import canonical, captured, refused, rewrites

aten = torch.ops.aten
EPS = 1e-5


def llama(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * wide.to(x.dtype)


def olmo(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (w.float() * wide).to(x.dtype)


def gemma(x, w):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + w.float())).type_as(x)


def t5(x, w):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS)).to(w.dtype)


def division(x, w):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def power(x, w):
    return w * (x * torch.pow(x.square().mean(-1, True) + EPS, -0.5))


FORMS = [llama, olmo, gemma, t5, division, power]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FORMS)
def test_every_form_is_one_operator(function, dtype):
    x = torch.randn(2, 5, 8, dtype=dtype)
    program = captured(Function(function, w=torch.randn(8).to(dtype)), x)
    before = program.clone()
    result = canonical(program, [torch.randn(3, 7, 8, dtype=dtype)])
    assert [site.detail for site in result.sites] == ["rms_norm"]
    assert count(program, aten.rms_norm.default) == 1
    left = operators(program)
    del left["aten.rms_norm.default"]
    assert set(left) <= {"aten.add.Tensor", "aten.to.dtype"} if function is gemma else not left
    # In the model's own dtype the operator rounds no more often than the written-out form.
    x = torch.randn(3, 7, 8, dtype=dtype)
    assert relative_error(run(program, [x]), run(before, [x])) <= 8 * torch.finfo(dtype).eps


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(1, 9)),
    batch=st.integers(1, 3),
    function=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size(shape, batch, function, dtype):
    program = captured(
        Function(function, w=torch.randn(shape[-1]).to(dtype)), torch.randn(shape).to(dtype)
    )
    canonical(program, [torch.randn(batch, 1, shape[-1]).to(dtype)])
    assert count(program, aten.rms_norm.default) == 1


def test_the_offset_of_a_one_plus_gain_is_a_fact():
    x = torch.randn(2, 5, 8)
    for function, offset in ((gemma, 1.0), (llama, 0.0)):
        for dtype in (torch.float32, torch.bfloat16):
            program = captured(Function(function, w=torch.randn(8).to(dtype)), x.to(dtype))
            canonical(program, [x.to(dtype)])
            [node] = program.nodes(aten.rms_norm.default)
            gain, found = norm_gain(node)
            assert gain is not None
            assert (gain.target, found) == ("w", offset)


def test_a_norm_without_gain_has_none():
    x = torch.randn(2, 5, 8)
    program = captured(
        Function(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)), x
    )
    rewrites(program, [rms_norm.RaiseRmsNorm()], [x], 1)
    assert norm_gain(program.nodes(aten.rms_norm.default)[0]) == (None, 0.0)


def test_a_computed_gain_is_folded_but_not_stored():
    x = torch.randn(2, 5, 8)
    program = captured(Function(lambda x, w: llama(x, w.sin()), w=torch.randn(8)), x)
    canonical(program, [x])
    assert norm_gain(program.nodes(aten.rms_norm.default)[0]) == (None, 0.0)


def test_aten_widens_half_precision_inside():
    # The rule that drops the casts rests on this: half a unit in the last place, and no more.
    torch.manual_seed(0)
    x, w = torch.randn(64, 256).bfloat16() * 30, torch.randn(256).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    ours = torch.rms_norm(x, [256], None, EPS)
    assert ((ours.double() - exact).abs() / exact.abs()).max() <= 2**-8
    error = (torch.rms_norm(x, [256], w, EPS).double() - exact * w).abs() / (exact * w).abs()
    assert error.nan_to_num().max() <= 2**-8


NOT_A_NORM = {
    "other axis": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "two axes": lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS),
    "cube": lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS),
    "sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "a rounded x": lambda x: x * torch.rsqrt(x.int().float().pow(2).mean(-1, keepdim=True) + EPS),
    "another x": lambda x: x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
}


@pytest.mark.parametrize("function", NOT_A_NORM.values(), ids=NOT_A_NORM.keys())
def test_look_alikes_are_left_alone(function):
    x = torch.randn(2, 5, 8)
    program = captured(Function(function), x)
    assert rewrites(program, rms_norm.RULES, [x], 0) == []


def core(x, eps: float = EPS):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_a_computed_epsilon_is_refused():
    program = captured(
        Function(lambda x, e: core(x, e), e=torch.full((), 1e-3)), torch.randn(2, 5, 8)
    )
    refused(program, rms_norm.RULES, "epsilon")


def test_a_width_that_varies_is_refused():
    program = captured(Function(core), torch.randn(2, 5, 8), dynamic={0: [0, 1, 2]})
    refused(program, rms_norm.RULES, "no fixed size")


def test_norms_of_one_value_keep_their_own_gains():
    def forward(x, v, w):
        return core(x) * v, w * core(x)

    program = captured(Function(forward, v=torch.randn(8), w=torch.randn(8)), torch.randn(2, 5, 8))
    canonical(program, [torch.randn(3, 7, 8)])
    assert operators(program) == {"aten.rms_norm.default": 2}
    gains = {norm_gain(node)[0].target for node in program.nodes()}
    assert gains == {"v", "w"}


def test_a_norm_that_is_also_read_without_gain_is_refused():
    def forward(x, w):
        normed = core(x)
        return normed * w, normed.sin()

    program = captured(Function(forward, w=torch.randn(8)), torch.randn(2, 5, 8))
    refused(program, rms_norm.RULES, "without its gain", done_before=1)


def test_a_wider_gain_is_refused():
    x = torch.randn(2, 5, 8)
    program = captured(Function(lambda x, w: core(x) * w, w=torch.randn(8).double()), x)
    refused(program, rms_norm.RULES, "wider dtype", done_before=1)


def test_a_norm_that_is_also_read_in_float32_is_refused():
    def forward(x):
        normed = core(x.float())
        return normed.to(x.dtype), normed.sin()

    program = captured(Function(forward), torch.randn(2, 5, 8).bfloat16())
    refused(program, rms_norm.RULES, "dtype it was computed in", done_before=1)
