import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import grouped_query
from tests.graphs import Function, count
from tests.passes.canonicalize.rules import captured, rewrites

fxopt = torch.ops.fxopt
DYNAMIC = {key: [0, 2] for key in range(3)}


def attend(q, k, v):
    return fxopt.attention(q, k, v, None, None, None, 0.3, False, None, None)


def expanded(x, groups):
    batch, heads, length, width = x.shape
    wide = x[:, :, None].expand(batch, heads, groups, length, width)
    return wide.reshape(batch, heads * groups, length, width)


def interleaved(x, groups):
    return x.repeat_interleave(groups, 1)


def tiled(x, groups):
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, groups, heads, length, width).reshape(batch, -1, length, width)


def tensors(heads: int, groups: int, batch: int = 2, length: int = 5):
    return (
        torch.randn(batch, heads * groups, length, 4),
        torch.randn(batch, heads, 6, 4),
        torch.randn(batch, heads, 6, 3),
    )


@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(2, 3),
    groups=st.integers(2, 3),
    repeat=st.sampled_from([expanded, interleaved]),
)
def test_repeated_heads_are_grouped(heads: int, groups: int, repeat):
    module = Function(lambda q, k, v: attend(q, repeat(k, groups), repeat(v, groups)))
    program = captured(module, *tensors(heads, groups), dynamic=DYNAMIC)
    rewrites(program, grouped_query.RULES, tensors(heads, groups, 3, 1), 1)
    [node] = program.nodes(fxopt.attention.default)
    assert [x.name for x in node.args[:3]] == ["input_0", "input_1", "input_2"]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: attend(q, tiled(k, 2), tiled(v, 2)),
        lambda q, k, v: attend(q, expanded(k, 2), tiled(v, 2)),
        lambda q, k, v: attend(q, expanded(k, 2), v[:, [0, 0, 1, 1]]),
        lambda q, k, v: attend(q, k.repeat_interleave(2, 2)[:, [0, 0, 1, 1]], v.repeat(1, 2, 2, 1)),
    ],
)
def test_other_repetitions_are_left_alone(function):
    program = captured(Function(function), *tensors(2, 2), dynamic=DYNAMIC)
    assert rewrites(program, grouped_query.RULES, tensors(2, 2), 0) == []
    assert count(program, fxopt.attention.default) == 1
