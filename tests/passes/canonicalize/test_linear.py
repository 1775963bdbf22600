import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fxopt.passes.canonicalize import cleanup, linear
from fxopt.rewrite.driver import apply_rules
from tests.graphs import Function, count, operators
from tests.passes.canonicalize.rules import canonical, captured, refused

aten = torch.ops.aten
X = torch.randn(2, 5, 4)


def weights(out: int = 6):
    return {"w": torch.randn(4, out), "b": torch.randn(out)}


def conv1d(x, w, b):
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view(x.size(0), x.size(1), w.size(1))


FORMS = {
    "conv1d": (conv1d, "transposed"),
    "matmul": (lambda x, w, b: x @ w + b, "transposed"),
    "matmul of a transpose": (lambda x, w, b: x @ w.t().t() + b, "transposed"),
    "mm": (lambda x, w, b: torch.mm(x.reshape(-1, 4), w).view(x.shape[0], -1, 6) + b, "transposed"),
    "linear of a transpose": (lambda x, w, b: functional.linear(x, w.T, b), "transposed"),
    "linear of a transposition": (
        lambda x, w, b: functional.linear(x, w.transpose(1, 0)) + b,
        "transposed",
    ),
}


@pytest.mark.parametrize(("function", "layout"), FORMS.values(), ids=FORMS.keys())
def test_every_form_is_linear_on_the_leading_dimensions(function, layout: str):
    parameters = weights()
    program = captured(Function(function, **parameters), X)
    result = canonical(program, [torch.randn(3, 1, 4)])
    assert operators(program) == {"aten.linear.default": 1}
    [node] = program.nodes(aten.linear.default)
    assert len(node.args[0].meta["val"].shape) == 3
    assert node.args[2].target == "b"
    assert program.layouts == {"w": layout}
    assert torch.equal(program.weight("w"), parameters["w"].t())
    assert program.weight("w").is_contiguous()
    assert {site.detail for site in result.sites} <= {"linear"}


def test_a_weight_that_linear_stores_its_own_way_stays():
    program = captured(Function(lambda x, w: x @ w.t(), w=torch.randn(6, 4)), X)
    canonical(program, [X])
    assert operators(program) == {"aten.linear.default": 1}
    assert program.layouts == {}


def test_transposing_twice_is_the_layout_of_the_model():
    program = captured(Function(lambda x, w: x @ w, w=torch.randn(4, 6)), X)
    program.layouts["w"] = "transposed"
    canonical(program, [X])
    assert program.layouts == {}


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_conv1d_of_any_size(sizes, dtype):
    batch, length, inner, outer = sizes
    module = Function(conv1d, w=torch.randn(inner, outer), b=torch.randn(outer)).to(dtype)
    program = captured(module, torch.randn(batch, length, inner, dtype=dtype))
    canonical(program, [torch.randn(1, 3, inner, dtype=dtype)])
    assert count(program, aten.linear.default) == 1


def test_tied_weights_are_transposed_in_the_graph():
    # The embedding reads rows of what the projection reads transposed.
    def forward(x, w):
        return functional.embedding(torch.arange(3), w), x @ w

    program = captured(Function(forward, w=torch.randn(4, 6)), X)
    result = canonical(program, [X])
    assert operators(program)["aten.t.default"] == 1
    assert operators(program)["aten.linear.default"] == 1
    assert program.layouts == {}
    assert "tied" in result.refusals[0].reason


def test_an_embedding_tied_to_the_output_projection_stays_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    ids = torch.arange(10).reshape(2, 5) % 9
    program = captured(Tied(), ids, dynamic={0: [0, 1]})
    canonical(program, [ids])
    [embedding], [projection] = (
        program.nodes(aten.embedding.default),
        program.nodes(aten.linear.default),
    )
    assert embedding.args[0] is projection.args[1]


def test_a_product_of_activations_is_no_linear():
    program = captured(Function(lambda x: x @ x.transpose(1, 2)), X)
    sites, refusals = apply_rules(program, linear.RULES, "test")
    assert (sites, refusals) == ([], [])


REFUSED = {
    "alpha": (
        lambda x, w, b: torch.addmm(b, x.view(-1, 4), w, alpha=2).sin(),
        "alpha or beta",
        0,
    ),
    "matrix bias": (
        lambda x, w, b: torch.addmm(b.expand(10, 6), x.view(10, 4), w).sin(),
        "not one vector",
        0,
    ),
}


@pytest.mark.parametrize("case", ["alpha", "matrix bias"])
def test_addmm_refusals(case: str):
    function, reason, done = REFUSED[case]
    program = captured(Function(function, **weights()), X, dynamic={})
    refused(program, [linear.RaiseAddmm()], reason, done)


def test_a_product_that_is_also_read_without_bias_is_refused():
    def forward(x, w, b):
        product = functional.linear(x, w)
        return product + b, product.sin()

    program = captured(Function(forward, w=torch.randn(6, 4), b=torch.randn(6)), X)
    refused(program, [linear.FoldBias()], "without its bias")


def test_a_vector_added_in_two_places_is_refused():
    def forward(x, w, b):
        return functional.linear(x, w) + b, functional.linear(x.sin(), w) + b

    program = captured(Function(forward, w=torch.randn(6, 4), b=torch.randn(6)), X)
    refused(program, [linear.FoldBias()], "several places")


def test_a_bias_of_another_dtype_is_refused():
    module = Function(
        lambda x, w, b: functional.linear(x, w) + b, w=torch.randn(6, 4), b=torch.randn(6)
    )
    module.w.data = module.w.data.double()
    program = captured(module, X.double())
    cleanup.remove_dead(program)
    refused(program, [linear.FoldBias()], "another dtype")
