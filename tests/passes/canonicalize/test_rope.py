import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import rope
from tests.graphs import Function, count, operators
from tests.passes.canonicalize.rules import canonical, captured, refused, rewrites
from tests.zoo import rotate_half, rotate_neighbours

aten = torch.ops.aten
fxopt = torch.ops.fxopt


def halves(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def halves_by_slices(x, cos, sin):
    half = x.shape[-1] // 2
    return sin * torch.cat((-x[..., half:], x[..., :half]), x.dim() - 1) + cos * x


def neighbours(x, cos, sin):
    return (x * cos) + (rotate_neighbours(x) * sin)


def on_halves(x, cos, sin):
    # gpt-oss: the tables cover one half and serve both.
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def on_neighbours(x, cos, sin):
    # DeepSeek: neighbours are turned and come out as halves.
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


FORMS = {halves: False, halves_by_slices: False, neighbours: True, on_halves: False}


def partial(function, rotary: int):
    def forward(x, cos, sin):
        part, rest = x[..., :rotary], x[..., rotary:]
        return torch.cat((function(part, cos, sin), rest), -1)

    return forward


def inputs(
    width: int, rotary: int, heads: int = 3, length: int = 5, batch: int = 2, dtype=torch.float32
):
    tensors = (
        torch.randn(batch, heads, length, width),
        torch.randn(length, rotary),
        torch.randn(length, rotary),
    )
    return tuple(tensor.to(dtype) for tensor in tensors)


DYNAMIC = {0: [0, 2], 1: [0], 2: [0]}


@settings(max_examples=12, deadline=None)
@given(
    function=st.sampled_from(list(FORMS)),
    half=st.integers(1, 4),
    rest=st.sampled_from([0, 0, 1, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_form_is_one_operator(function, half, rest, dtype):
    rotary, width = 2 * half, 2 * half + rest
    forward = partial(function, rotary) if rest else function
    program = captured(Function(forward), *inputs(width, rotary, dtype=dtype), dynamic=DYNAMIC)
    result = canonical(program, inputs(width, rotary, length=7, batch=1, dtype=dtype))
    assert [site.detail for site in result.sites] == ["rope"]
    [node] = program.nodes(fxopt.rope.default)
    assert node.args[3] is FORMS[function] or rotary == 2
    assert node.args[0].name == "input_0"
    if function is not on_halves:
        assert operators(program) == {"fxopt.rope.default": 1}


def test_the_layout_of_gpt_j():
    # Heads after the length, tables of half width spread over neighbours.
    def forward(x, cos, sin):
        sin, cos = (table[:, :, None, :].repeat_interleave(2, 3) for table in (sin, cos))
        return x * cos + rotate_neighbours(x) * sin

    tensors = (torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    program = captured(Function(forward), *tensors, dynamic={key: [0, 1] for key in range(3)})
    canonical(program, tensors)
    assert count(program, fxopt.rope.default) == 1
    assert count(program, aten.stack.default) == 0


def test_half_precision_with_float32_tables_keeps_its_dtype():
    x, cos, sin = inputs(8, 8)
    program = captured(Function(halves), x.bfloat16(), cos, sin, dynamic=DYNAMIC)
    canonical(program, (x.bfloat16(), cos, sin))
    [node] = program.nodes(fxopt.rope.default)
    assert node.meta["val"].dtype == torch.float32


NOT_ROPE = {
    "sign": lambda x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s,
    "no sign": lambda x, c, s: x * c + torch.cat((x[..., 4:], x[..., :4]), -1) * s,
    "uneven": lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s,
    "another x": lambda x, c, s: x.sin() * c + rotate_half(x) * s,
    "difference": lambda x, c, s: x * c - rotate_half(x) * s,
    "swapped neighbours": lambda x, c, s: (
        x * c + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * s
    ),
    "neighbours side by side": lambda x, c, s: (
        x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s
    ),
    "stacked first": lambda x, c, s: (
        x * c + torch.stack((-x[..., 1::2], x[..., ::2]), 0).reshape(x.shape) * s
    ),
    "halves, wrong sign": lambda x, c, s: torch.cat(
        (
            x[..., :4] * c[..., :4] + x[..., 4:] * s[..., :4],
            x[..., 4:] * c[..., :4] + x[..., :4] * s[..., :4],
        ),
        -1,
    ),
}


def test_neighbours_that_come_out_as_halves():
    tensors = inputs(8, 8)
    program = captured(Function(on_neighbours), *tensors, dynamic=DYNAMIC)
    rewrites(program, rope.RULES, tensors, 1)
    [node] = program.nodes(fxopt.rope.default)
    assert node.args[0].target is aten.cat.default
    assert node.args[3] is False


@pytest.mark.parametrize("function", NOT_ROPE.values(), ids=NOT_ROPE.keys())
def test_look_alikes_are_left_alone(function):
    tensors = inputs(8, 8)
    program = captured(Function(function), *tensors, dynamic=DYNAMIC)
    assert rewrites(program, rope.RULES, tensors, 0) == []


def test_another_axis_is_left_alone():
    def forward(x, cos, sin):
        turned = torch.cat((-x[:, :, 4:], x[:, :, :4]), 2)
        return x * cos + turned * sin

    tensors = torch.randn(2, 3, 8, 8), torch.randn(8, 8), torch.randn(8, 8)
    program = captured(Function(forward), *tensors, dynamic={})
    assert rewrites(program, rope.RULES, tensors, 0) == []


@pytest.mark.parametrize(("start", "stop"), [(3, 8), (5, 8), (2, 6), (0, 4)])
def test_a_gap_or_overlap_keeps_the_partial_form(start: int, stop: int):
    def forward(x, cos, sin):
        return torch.cat((halves(x[..., :4], cos, sin), x[..., start:stop]), -1)

    tensors = inputs(8, 4)
    program = captured(Function(forward), *tensors, dynamic=DYNAMIC)
    rewrites(program, rope.RULES, tensors, 1)
    assert count(program, aten.cat.default) == 1


def test_a_rotated_part_that_is_read_alone_is_refused():
    def forward(x, cos, sin):
        turned = halves(x[..., :4], cos, sin)
        return torch.cat((turned, x[..., 4:]), -1), turned.sum(1)

    program = captured(Function(forward), *inputs(8, 4), dynamic=DYNAMIC)
    refused(program, rope.RULES, "without the rest", done_before=1)


def test_tables_of_different_dtypes_are_refused():
    x, cos, sin = inputs(8, 8)
    program = captured(Function(halves), x, cos.double(), sin, dynamic=DYNAMIC)
    refused(program, rope.RULES, "different dtypes")
