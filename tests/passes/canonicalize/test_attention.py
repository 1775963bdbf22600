import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.canonicalize import attention
from fxopt.passes.canonicalize.scores import read_scores
from tests.graphs import Function, capture_module, count, operators
from tests.passes.canonicalize.rules import canonical, captured, refused

aten = torch.ops.aten
fxopt = torch.ops.fxopt
LOWEST = torch.finfo(torch.float32).min
DYNAMIC = {key: [0, 2] for key in range(3)}
HEADS = 4


def tensors(batch=2, length=5, keys=6, heads=HEADS, kv=HEADS, dtype=torch.float32):
    shapes = (batch, heads, length, 8), (batch, kv, keys, 8), (batch, kv, keys, 7)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def bias(q, k):
    """Distances, different for every head, as ALiBi and T5 add them."""
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]
    return (
        distance.to(q.dtype) * torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=q.dtype)[:, None, None]
    )


def hidden(q, k):
    return torch.arange(q.shape[2])[:, None] < torch.arange(k.shape[2])[None]


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def scaled_after(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), -1) @ v


def scaled_before(q, k, v):
    return torch.softmax((q * 0.3) @ (k / 2).permute(0, 1, 3, 2), -1) @ v


def in_float32(q, k, v):
    scores = (q @ k.mT) * 0.3
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(weights, 0.1, training=False) @ v


def biased(q, k, v):
    return torch.softmax(bias(q, k) + (q @ k.mT) * 0.3, -1) @ v


def subtracted(q, k, v):
    return torch.softmax((q @ k.mT) * 0.3 - bias(q, k), -1) @ v


def bias_scaled_too(q, k, v):
    # Falcon: the distances are scaled with the scores.
    return torch.softmax((q @ k.mT + bias(q, k)) * 0.3, -1) @ v


def filled(q, k, v):
    scores = (q @ k.mT).masked_fill(hidden(q, k), LOWEST)
    return torch.softmax(scores, -1) @ v


def filled_with_infinity(q, k, v):
    # Every row sees the first key, so none is empty.
    return torch.softmax(((q @ k.mT) * 0.3).masked_fill(hidden(q, k), -torch.inf), -1) @ v


def chosen_then_added(q, k, v):
    # GPT-Neo: a choice by a causal table, then an additive mask.
    scores = torch.where(~hidden(q, k), q @ k.mT, torch.tensor(LOWEST))
    return torch.softmax(scores + bias(q, k), -1) @ v


def biased_then_filled(q, k, v):
    # MPT: distances are added, then masked positions are replaced.
    scores = (q @ k.mT) * 0.3 + bias(q, k)[:, -1:]
    return torch.softmax(scores.masked_fill(hidden(q, k), LOWEST), -1) @ v


def chosen_the_other_way(q, k, v):
    return torch.softmax(torch.where(hidden(q, k), LOWEST, q @ k.mT), -1) @ v


def scaled_keys(q, k, v):
    # DeBERTa scales the transposed keys.
    return torch.softmax(q @ (k.mT / 3.0), -1) @ v


def everything_hidden(q, k, v):
    scores = (q @ k.mT).masked_fill(hidden(q, k) | (k.sum(-1) > -1e9)[:, :, None], LOWEST)
    return torch.softmax(scores + bias(q, k) * 0, -1) @ v


def capped(q, k, v):
    scores = torch.tanh((q @ k.mT) * 0.3 / 5.0) * 5.0
    return torch.softmax(scores + bias(q, k), -1) @ v


def by_einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhsd,bhtd->bhst", q, k) * 0.3, -1)
    return torch.einsum("bhst,bhtd->bhsd", weights, v)


def batched(q, k, v):
    q3, k3, v3 = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q3 * 0.3, k3.transpose(1, 2)), -1)
    return torch.bmm(weights, v3).view(q.shape[0], HEADS, q.shape[2], -1)


def bloom(q, k, v):
    q3, k3, v3 = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    alibi = bias(q, k)[:, -1:].repeat(q.shape[0], 1, 1)
    scores = alibi.baddbmm(batch1=q3, batch2=k3.transpose(1, 2), beta=0.5, alpha=0.3)
    scores = scores.view(q.shape[0], HEADS, q.shape[2], -1)
    scores = scores + torch.zeros(()).masked_fill(hidden(q, k), LOWEST)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(-1, q.shape[2], k.shape[2]), v3).view(q.shape[0], HEADS, -1, 7)


FORMS = [
    plain,
    scaled_after,
    scaled_before,
    in_float32,
    biased,
    subtracted,
    bias_scaled_too,
    filled,
    filled_with_infinity,
    chosen_then_added,
    biased_then_filled,
    chosen_the_other_way,
    scaled_keys,
    everything_hidden,
    capped,
    by_einsum,
    batched,
    bloom,
]


@pytest.mark.parametrize("function", FORMS)
def test_every_form_is_one_operator(function):
    program = capture_module(Function(function), *tensors(), dynamic=DYNAMIC)
    result = canonical(program, tensors(3, 4, 7))
    assert [site.detail for site in result.sites] == ["attention"]
    assert count(program, fxopt.attention.default) == 1
    left = operators(program)
    assert not {"aten.softmax.int", "aten.matmul.default", "aten.bmm.default"} & set(left)


@settings(max_examples=12, deadline=None)
@given(
    function=st.sampled_from([in_float32, biased, filled, capped, batched, biased_then_filled]),
    length=st.integers(1, 6),
    extra=st.integers(0, 3),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size_and_dtype(function, length, extra, batch, dtype):
    program = captured(Function(function), *tensors(dtype=dtype), dynamic=DYNAMIC)
    canonical(program, tensors(batch, length, length + extra, dtype=dtype))
    assert count(program, fxopt.attention.default) == 1


def test_the_arguments_say_what_the_model_wrote():
    program = captured(Function(capped), *tensors(), dynamic=DYNAMIC)
    canonical(program, tensors())
    q, k, v, padding, mask, sinks, scale, causal, window, softcap = program.nodes(
        fxopt.attention.default
    )[0].args
    assert [x.name for x in (q, k, v)] == ["input_0", "input_1", "input_2"]
    assert (padding, sinks, causal, window) == (None, None, False, None)
    assert scale == pytest.approx(0.3)
    assert softcap == 5.0
    assert mask is not None


def test_one_head_without_an_axis():
    def forward(q, k, v):
        scores = (q @ k.transpose(1, 2)) * 0.3 + torch.arange(k.shape[1]).float()
        return torch.softmax(scores, -1) @ v

    shapes = (2, 5, 8), (2, 6, 8), (2, 6, 7)
    inputs = [torch.randn(shape) for shape in shapes]
    program = captured(Function(forward), *inputs, dynamic={key: [0, 1] for key in range(3)})
    canonical(program, [torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 7)])
    [node] = program.nodes(fxopt.attention.default)
    assert node.args[0].meta["val"].shape[1] == 1


def test_one_mask_per_row_without_heads():
    def forward(q, k, v, m):
        return torch.softmax(q @ k.transpose(1, 2) + m, -1) @ v

    shapes = (3, 5, 8), (3, 6, 8), (3, 6, 7), (3, 5, 6)
    inputs = [torch.randn(shape) for shape in shapes]
    program = captured(Function(forward), *inputs, dynamic={})
    canonical(program, inputs)
    assert count(program, fxopt.attention.default) == 1


def test_float32_masks_of_half_precision_scores_stay_finite():
    # The lowest float32 is -inf in bfloat16: a row that sees nothing would change.
    def forward(q, k, v, m):
        return torch.softmax((q @ k.mT).float() + m, -1).to(v.dtype) @ v

    inputs = (*tensors(dtype=torch.bfloat16), torch.full((5, 6), LOWEST))
    program = captured(Function(forward), *inputs, dynamic={})
    expected = program.graph_module(*inputs)[0]
    canonical(program, inputs)
    got = program.graph_module(*inputs)[0]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_shared_keys_are_grouped():
    def forward(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.softmax(q @ k.mT, -1) @ v

    program = captured(Function(forward), *tensors(kv=2), dynamic=DYNAMIC)
    canonical(program, tensors(kv=2))
    [node] = program.nodes(fxopt.attention.default)
    assert node.args[1].name == "input_1"


def test_a_rounded_quotient_is_no_scale():
    def forward(q, k, v):
        return torch.softmax(torch.div(q, 2.0, rounding_mode="floor") @ k.mT, -1) @ v

    program = captured(Function(forward), *tensors(), dynamic=DYNAMIC)
    canonical(program, tensors())
    [node] = program.nodes(fxopt.attention.default)
    assert node.args[0].target is aten.div.Tensor_mode
    assert node.args[6] == 1.0


def test_half_precision_that_a_model_widens_for_the_scores():
    # GPT-J and GPT-Neo compute scores in float32 and multiply values in half precision.
    def forward(q, k, v):
        weights = torch.softmax(q.float() @ k.float().transpose(-1, -2), -1).to(v.dtype)
        return weights @ v

    program = captured(Function(forward), *tensors(dtype=torch.bfloat16), dynamic=DYNAMIC)
    canonical(program, tensors(dtype=torch.bfloat16))
    assert operators(program) == {"fxopt.attention.default": 1}


def probabilities_escape(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def filled_too_high(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(hidden(q, k), -1e4), -1) @ v


def scaled_after_filling(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(hidden(q, k), LOWEST) / 3, -1) @ v


def capped_after_masking(q, k, v):
    return torch.softmax(torch.tanh((q @ k.mT + bias(q, k)) / 5) * 5, -1) @ v


def boolean_added(q, k, v):
    return torch.softmax(q @ k.mT + hidden(q, k), -1) @ v


def other_batch(q, k, v):
    return torch.softmax(q @ k[:1].mT, -1) @ v


def other_heads(q, k, v):
    return torch.softmax(q @ k[:, :1].mT, -1) @ v


def mixed_dtypes(q, k, v):
    return torch.softmax(q @ k.mT, -1).double() @ v.cos().double().exp()


def rounded_scores(q, k, v):
    return torch.softmax((q @ k.mT).int().float(), -1) @ v


def rounded_probabilities(q, k, v):
    return torch.softmax(q @ k.mT * 30, -1).int().float() @ v


REFUSED = [
    (probabilities_escape, "read elsewhere"),
    (filled_too_high, "not low enough"),
    (scaled_after_filling, "capped or filled"),
    (capped_after_masking, "after a mask was added"),
    (boolean_added, "boolean mask"),
    (other_batch, "one batch size"),
    (other_heads, "heads of queries"),
    (mixed_dtypes, "different dtypes"),
    (rounded_scores, "scores are converted to or from integers"),
    (rounded_probabilities, "probabilities are converted to or from integers"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_refusals(function, reason: str):
    program = captured(Function(function), *tensors(), dynamic=DYNAMIC)
    refused(program, attention.RULES, reason)


def test_five_dimensions_are_refused():
    shapes = (2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 7)
    program = captured(Function(plain), *(torch.randn(shape) for shape in shapes), dynamic={})
    refused(program, attention.RULES, "attention takes 4")


def test_values_with_other_axes_are_refused():
    shapes = (2, 5, 8), (2, 6, 8), (4, 2, 6, 7)
    program = captured(Function(plain), *(torch.randn(shape) for shape in shapes), dynamic={})
    refused(program, attention.RULES, "other axes")


NOT_ATTENTION = [
    lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,
    lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
    lambda q, k, v: torch.softmax(q.sum(1, True), -1) @ k.mT,
    lambda q, k, v: (torch.softmax(q @ k.mT, -1) * 2) @ v,
    lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 2.0, rounding_mode="floor"), -1) @ v,
]


@pytest.mark.parametrize("function", NOT_ATTENTION)
def test_look_alikes_are_left_alone(function):
    program = captured(Function(function), *tensors(), dynamic=DYNAMIC)
    result = canonical(program, tensors())
    assert (result.sites, result.refusals) == ((), ())


def test_reading_scores_finds_every_part():
    def forward(q, k, v):
        return (torch.tanh((q * 2) @ k.mT / 5) * 5).masked_fill(hidden(q, k), LOWEST) + bias(q, k)

    program = captured(Function(forward), *tensors(), dynamic=DYNAMIC)
    scores = read_scores(program.graph.output_node().args[0][0])
    assert scores is not None
    assert scores.q.name == "input_0"
    assert (scores.scale, scores.softcap) == (2.0, 5.0)
    assert [term.fill for term in scores.terms] == [LOWEST, None]
    assert read_scores(program.graph.find_nodes(op="placeholder")[0]) is None
