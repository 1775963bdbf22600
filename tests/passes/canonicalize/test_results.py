"""Who writes to a result changes nothing but the result, unless the model shared it as well."""

import pytest
import torch
from torch import nn

from tests.graphs import Function, capture_module, count, run
from tests.passes.canonicalize.rules import canonical

aten = torch.ops.aten
X = torch.randn(2, 5, 4)


def two_of_one(x):
    y = x.sin()
    return y, y


# What a model returns, and how many of its results must be copied for it.
RETURNED = {
    "a copy of the input": (lambda x, w: x.clone(), 1),
    "nothing added": (lambda x, w: x + 0, 1),
    "a view of a copy": (lambda x, w: x.clone()[:, 1:], 1),
    "contiguous": (lambda x, w: x.transpose(0, 1).contiguous(), 1),
    "the input": (lambda x, w: x, 0),
    "a view of the input": (lambda x, w: x[:, 1:], 0),
    "a weight": (lambda x, w: (x * 2, w), 1),
    "a copy of a weight": (lambda x, w: (x * 2, w.clone()), 1),
    "a literal": (lambda x, w: (x * 2, torch.tensor([0.0, 1.0]) + 1), 1),
    "a copy of a result": (lambda x, w: (y := x.sin(), y.clone()), 1),
    "equal results": (lambda x, w: (x.sin(), x.sin()), 1),
    "one result twice": (lambda x, w: two_of_one(x), 0),
    "one copy twice": (lambda x, w: (y := x.clone(), y), 1),
    "a copy of what is computed": (lambda x, w: x.sin().clone(), 0),
    "a conversion": (lambda x, w: x.double(), 0),
}


@pytest.mark.parametrize(("function", "copies"), RETURNED.values(), ids=RETURNED.keys())
def test_results_share_what_the_model_shared(function, copies: int):
    program = capture_module(Function(function, w=torch.randn(4)), X)
    expected = [value.clone() for value in run(program, [X])]
    canonical(program, [torch.randn(3, 6, 4)])
    assert count(program, aten.clone.default) == copies
    x = X.clone()
    for index in range(len(expected)):
        got = run(program, [x])
        torch.testing.assert_close(got, expected)
        assert not any(isinstance(value, nn.Parameter) for value in got)
        if copies:
            got[index].zero_()
            assert torch.equal(x, X)
