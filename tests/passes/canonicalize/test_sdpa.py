import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.passes.canonicalize import sdpa as raising
from tests.graphs import Function, operators
from tests.passes.canonicalize.rules import captured, refused, rewrites

fxopt = torch.ops.fxopt
DYNAMIC = {key: [0, 2] for key in range(3)}


def tensors(heads=4, kv=4, batch=2, length=5, keys=6, dtype=torch.float32):
    shapes = (batch, heads, length, 8), (batch, kv, keys, 8), (batch, kv, keys, 8)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@settings(max_examples=10, deadline=None)
@given(
    scale=st.sampled_from([None, 0.5]),
    groups=st.sampled_from([1, 2]),
    mask=st.sampled_from(["none", "additive", "boolean"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_argument_is_carried_over(scale, groups, mask, dtype):
    def forward(q, k, v):
        positions = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]
        chosen = {"none": None, "additive": positions.to(q.dtype), "boolean": positions >= -1}[mask]
        return sdpa(q, k, v, attn_mask=chosen, scale=scale, enable_gqa=groups > 1)

    program = captured(Function(forward), *tensors(4, 4 // groups, dtype=dtype), dynamic=DYNAMIC)
    rewrites(program, raising.RULES, tensors(4, 4 // groups, 1, 3, 7, dtype=dtype), 1)
    [node] = program.nodes(fxopt.attention.default)
    assert node.args[6] == (8**-0.5 if scale is None else scale)
    assert (node.args[4] is None) == (mask == "none")
    assert not operators(program)["aten.scaled_dot_product_attention.default"]


def test_causal_over_one_length():
    x = torch.randn(2, 4, 5, 8)
    program = captured(Function(lambda x: sdpa(x, x, x, is_causal=True)), x, dynamic={0: [0, 2]})
    rewrites(program, raising.RULES, [torch.randn(1, 4, 7, 8)], 1)
    assert program.nodes(fxopt.attention.default)[0].args[7] is True


def test_one_head_without_an_axis():
    def forward(q, k, v):
        return sdpa(q, k, v, attn_mask=torch.zeros(2, 5, 6))

    shapes = (2, 5, 8), (2, 6, 8), (2, 6, 8)
    inputs = [torch.randn(shape) for shape in shapes]
    program = captured(Function(forward), *inputs, dynamic={})
    rewrites(program, raising.RULES, inputs, 1)


REFUSED = {
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), "at random"),
    "alignment": (lambda q, k, v: sdpa(q, k, v, is_causal=True), "aligns the first query"),
    "batch": (lambda q, k, v: sdpa(q, k[:1], v[:1]), "of one batch"),
    "heads": (lambda q, k, v: sdpa(q, k, v[:, :1].expand(-1, 4, -1, -1)[:, :1]), "do not fit"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(function, reason: str):
    program = captured(Function(function), *tensors(), dynamic=DYNAMIC)
    refused(program, raising.RULES, reason)


def test_a_head_size_that_varies_is_refused():
    x = torch.randn(2, 4, 5, 8)
    program = captured(Function(lambda x: sdpa(x, x, x)), x, dynamic={0: [3]})
    refused(program, raising.RULES, "size of a head")
