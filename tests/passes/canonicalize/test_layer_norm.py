import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import layer_norm
from tests.graphs import Function, operators, run
from tests.passes.canonicalize.rules import canonical, captured, refused, rewrites

aten = torch.ops.aten
EPS = 1e-5


def written_out(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w + b


def by_variance(x, w, b):
    variance = x.var(-1, keepdim=True, unbiased=False)
    return b + w * ((x - x.mean(-1, True)) * torch.rsqrt(variance + EPS))


def by_correction(x, w, b):
    variance = x.var(-1, keepdim=True, correction=0)
    return (x - x.mean(-1, True)) / (variance + EPS).sqrt() * w + b


def cohere(x, w, b):
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    wide = (wide - mean) * torch.rsqrt(variance + EPS)
    return (w.to(torch.float32) * wide + b.to(torch.float32)).to(x.dtype)


FORMS = [written_out, by_variance, by_correction, cohere]


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(2, 9)),
    batch=st.integers(1, 3),
    function=st.sampled_from(FORMS),
)
def test_every_form_is_one_operator(shape, batch, function):
    module = Function(function, w=torch.randn(shape[-1]), b=torch.randn(shape[-1]))
    program = captured(module, torch.randn(shape))
    result = canonical(program, [torch.randn(batch, 1, shape[-1])])
    assert operators(program) == {"aten.layer_norm.default": 1}
    assert [site.detail for site in result.sites] == ["layer_norm"]


def test_half_precision_keeps_its_dtype():
    x = torch.randn(2, 5, 8).bfloat16()
    module = Function(cohere, w=torch.randn(8).bfloat16(), b=torch.randn(8).bfloat16())
    program = captured(module, x)
    canonical(program, [x])
    [node] = program.nodes(aten.layer_norm.default)
    assert node.args[0].meta["val"].dtype == torch.bfloat16


NOT_A_NORM = {
    "unbiased": lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + EPS).sqrt(),
    "eps outside": lambda x: (x - x.mean(-1, True)) / (x.var(-1, True, keepdim=True).sqrt() + EPS),
    "a rounded mean": lambda x: (
        (x - x.int().float().mean(-1, True))
        / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    ),
    "another mean": lambda x: (
        (x - x.sin().mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    ),
    "other axis": lambda x: (
        (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + EPS).sqrt()
    ),
}


@pytest.mark.parametrize("function", NOT_A_NORM.values(), ids=NOT_A_NORM.keys())
def test_look_alikes_are_left_alone(function):
    x = torch.randn(2, 5, 8)
    assert rewrites(captured(Function(function), x), layer_norm.RULES, [x], 0) == []


def core(x, eps=EPS):
    return (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def test_a_computed_epsilon_is_refused():
    program = captured(Function(core, e=torch.full((), 1e-3)), torch.randn(2, 5, 8))
    refused(program, layer_norm.RULES, "epsilon")


def test_norms_of_one_value_keep_their_own_gains_and_biases():
    def forward(x, v, w, b):
        return core(x) * v + b, w * core(x)

    weights = {name: torch.randn(8) for name in "vwb"}
    program = captured(Function(forward, **weights), torch.randn(2, 5, 8))
    canonical(program, [torch.randn(3, 7, 8)])
    assert operators(program) == {"aten.layer_norm.default": 2}


def test_a_shared_norm_is_refused():
    def forward(x, w):
        normed = core(x)
        return normed * w, normed.sin()

    program = captured(Function(forward, w=torch.randn(8)), torch.randn(2, 5, 8))
    refused(program, layer_norm.RULES, "without its gain", done_before=1)


def test_a_narrower_gain_and_bias_are_widened_as_the_model_widened_them():
    weights = {name: torch.randn(8).bfloat16() for name in "wb"}
    x = torch.randn(2, 5, 8)
    program = captured(Function(lambda x, w, b: core(x) * w + b, **weights), x)
    before = run(program, [x])
    canonical(program, [x])
    assert operators(program) == {"aten.layer_norm.default": 1, "aten.to.dtype": 2}
    torch.testing.assert_close(run(program, [x]), before)


def test_a_wider_gain_is_refused():
    module = Function(lambda x, w: core(x) * w, w=torch.randn(8).double())
    program = captured(module, torch.randn(2, 5, 8))
    refused(program, layer_norm.RULES, "wider dtype", done_before=1)
