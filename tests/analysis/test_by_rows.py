"""Float64 a few rows of a weight at a time: the same numbers, and never a whole weight."""

import pytest
import torch

from fxopt.analysis import by_rows
from fxopt.analysis.by_rows import ByRows
from fxopt.analysis.execution import run_float64
from tests.models import canonical_program

aten = torch.ops.aten


@pytest.fixture
def few_rows(monkeypatch):
    """Three rows of seven at a time."""
    monkeypatch.setattr(by_rows, "_ROWS_BYTES", 3 * 7 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_is_that_of_the_whole_weight(few_rows, dtype, shape, with_bias):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(10, 7, dtype=dtype)
    bias = torch.randn(10, dtype=dtype) if with_bias else None
    rows = ByRows()
    result = rows.call(aten.linear.default, (x, weight, bias))
    expected = aten.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert result is not None
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    assert rows.scratch.numel() == 3 * 7


def test_an_embedding_looks_up_before_it_converts():
    table, index = torch.randn(9, 4), torch.tensor([[3, 8], [0, 3]])
    result = ByRows().call(aten.embedding.default, (table, index))
    assert result is not None
    assert torch.equal(result, table.double()[index])


@pytest.mark.parametrize(
    "call",
    [
        (aten.linear.default, (torch.randn(2, 7), torch.randn(2, 7))),
        (aten.linear.default, (torch.randn(2, 7), torch.randn(99, 7).double())),
        (aten.linear.default, (torch.randn(2, 7), torch.randn(99))),
        (aten.mm.default, (torch.randn(2, 7), torch.randn(7, 99))),
        (aten.embedding.default, (torch.randn(9, 4).double(), torch.tensor([1]))),
    ],
    ids=["small", "float64 already", "a vector", "another operator", "a float64 table"],
)
def test_all_else_is_called_as_a_whole(few_rows, call):
    assert ByRows().call(*call) is None


def test_a_model_by_rows_is_the_model(monkeypatch):
    program = canonical_program("llama")
    whole = run_float64(program, program.examples[0])
    monkeypatch.setattr(by_rows, "_ROWS_BYTES", 1024)
    for ours, theirs in zip(run_float64(program, program.examples[0]), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
