import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fxopt.passes.canonicalize import cleanup
from fxopt.passes.canonicalize.cleanup import holds_every_value
from fxopt.rewrite.driver import apply_rules
from tests.graphs import Function, capture_module, operators, signature_of
from tests.passes.canonicalize.rules import rewrites

NOTHING = {
    "dropout": lambda x: functional.dropout(x, 0.3, training=False),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0, training=True),
    "alpha dropout": lambda x: functional.alpha_dropout(x, 0.3, training=False),
    "feature dropout": lambda x: torch.feature_dropout(x, 0.3, False),
    "cast": lambda x: x.to(torch.float32),
    "device": lambda x: x.to("cpu", torch.float32),
    "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "slice": lambda x: x[:, 0:],
    "expand": lambda x: x.expand(x.shape),
    "times one": lambda x: x * 1,
    "over one": lambda x: x / 1.0,
    "plus zero": lambda x: 0.0 + x,
    "minus zero": lambda x: x - 0,
    "power one": lambda x: x**1,
    "one piece": lambda x: torch.cat([x], 0),
    "an empty piece": lambda x: torch.cat([x[:, :0], x], 1),
    "a vector of nothing": lambda x: torch.cat([torch.zeros(0), x], -2),
    "reshape": lambda x: x.reshape(x.shape),
}


@pytest.mark.parametrize("function", NOTHING.values(), ids=NOTHING.keys())
def test_what_computes_nothing_goes(function):
    x = torch.randn(3, 5, 4)
    program = capture_module(Function(lambda x: torch.exp(function(torch.sin(x)))), x)
    apply_rules(program, cleanup.RULES, "test")
    cleanup.remove_dead(program)
    assert set(operators(program)) == {"aten.sin.default", "aten.exp.default"}
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(program.graph_module(x)[0], x.sin().exp(), rtol=0, atol=0)


SOMETHING = {
    "training dropout": lambda x: functional.dropout(x, 0.3, training=True),
    "half": lambda x: x.to(torch.bfloat16),
    "part": lambda x: x[:, 1:],
    "every other": lambda x: x[..., ::2],
    "repeat": lambda x: x.repeat(1, 1, 2),
    "broadcast": lambda x: x + torch.zeros(3, 1, 1, 1),
    "plus one": lambda x: x + 1,
    "promotion": lambda x: x * torch.ones((), dtype=torch.float64).expand(4),
}


@pytest.mark.parametrize("function", SOMETHING.values(), ids=SOMETHING.keys())
def test_what_computes_something_stays(function):
    program = capture_module(Function(lambda x: function(torch.sin(x))), torch.randn(3, 5, 4))
    apply_rules(program, cleanup.RULES, "test")
    before = signature_of(program)
    apply_rules(program, cleanup.RULES, "test")
    assert signature_of(program) == before
    assert len(operators(program)) > 1


CASTS = {
    "to": lambda x: x.to(torch.float64),
    "device": lambda x: x.to("cpu", torch.float64),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "method": lambda x: x.double(),
}


@pytest.mark.parametrize("function", CASTS.values(), ids=CASTS.keys())
def test_every_cast_is_written_the_same(function):
    x = torch.randn(3, 5, 4)
    program = capture_module(Function(lambda x: torch.sin(function(x))), x)
    apply_rules(program, cleanup.RULES, "test")
    [cast] = [node for node in program.nodes() if "to" in str(node.target)]
    assert cast.target is torch.ops.aten.to.dtype
    assert cast.args[1:] == (torch.float64,)
    assert cast.kwargs == {}


DTYPES = [torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]


@given(narrow=st.sampled_from(DTYPES), wide=st.sampled_from([*DTYPES, torch.float64]))
def test_a_dtype_that_holds_every_value_gives_each_back(narrow, wide):
    if not holds_every_value(wide, narrow):
        return
    if narrow == torch.bool:
        values = torch.tensor([True, False])
    elif narrow.is_floating_point:
        info = torch.finfo(narrow)
        values = torch.tensor([info.min, info.max, info.tiny, 1 + info.eps], dtype=narrow)
    else:
        info = torch.iinfo(narrow)
        values = torch.tensor([info.min, info.max, info.max - 1], dtype=narrow)
    assert torch.equal(values.to(wide).to(narrow), values)


@pytest.mark.parametrize(
    ("inner", "outer", "left"),
    [
        (torch.float32, torch.bfloat16, 0),  # up and back: nothing
        (torch.float64, torch.float32, 1),  # through something wider: one cast
        (torch.float16, torch.float32, 2),  # rounds: stays
        (torch.int32, torch.float32, 2),  # truncates: stays
    ],
)
def test_casts_in_a_row_merge_unless_one_rounds(inner, outer, left):
    x = torch.randn(3, 5, 4).bfloat16()
    program = capture_module(Function(lambda x: x.to(inner).to(outer)), x)
    apply_rules(program, cleanup.RULES, "test")
    assert sum(operators(program).values()) == left


@settings(max_examples=8, deadline=None)
@given(length=st.integers(2, 6), width=st.integers(1, 5))
def test_empty_pieces_are_dropped(length: int, width: int):
    x = torch.randn(2, length, width)
    module = Function(lambda x: torch.cat([x.sin(), x[..., width:], x.cos()], -1))
    program = capture_module(module, x)
    rewrites(program, [cleanup.DropEmptyPieces()], [x], 1)
    [cat] = program.nodes(torch.ops.aten.cat.default)
    assert len(cat.args[0]) == 2


def test_dead_nodes_and_weights_go():
    module = Function(
        lambda x, w, unused: (x + w, x * unused)[:1], w=torch.ones(4), unused=torch.ones(4)
    )
    program = capture_module(module, torch.randn(3, 5, 4))
    cleanup.remove_dead(program)
    assert set(program.weights()) == {"w"}
    assert cleanup.remove_dead(program) == 0
