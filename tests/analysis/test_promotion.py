"""The float64 twin: everything reads as float64, and only what was edited is stored so."""

import tempfile

import pytest
import torch

import fxopt
from fxopt.analysis.execution import promote, run, run_float64
from fxopt.analysis.promotion import on_disk, promote_program
from fxopt.errors import NotEquivalentError
from fxopt.ir.program import iterate_weights
from fxopt.passes.base import Context
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.folds import NudgedFold, RightFold
from tests.models import canonical_program

EVERYWHERE = [0, 1 << 30]  # bytes of edits held in memory: none, all


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_twin_stores_nothing_until_something_is_edited():
    program = canonical_program("llama")
    twin = promote_program(program, 0).clone()
    stored, mine = dict(iterate_weights(twin.graph_module)), program.weights()
    assert stored.keys() == twin.weights().keys() == mine.keys()
    assert all(stored[name].data_ptr() == mine[name].data_ptr() for name in mine)
    for name, value in twin.weights().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, mine[name].double())
        assert torch.equal(twin.weight(name), value)
    assert twin.byte_count() == program.byte_count()


@pytest.mark.parametrize("memory", EVERYWHERE)
def test_an_edit_is_stored_exactly(folder, memory):
    twin = promote_program(canonical_program("llama"), memory).clone()
    name = "model.norm.weight"
    exact = twin.weight(name) / 3
    twin.set_weight(name, exact)
    stored = dict(iterate_weights(twin.graph_module))[name]
    assert stored.dtype == torch.float64
    assert torch.equal(stored, exact)
    assert (stored.data_ptr() == exact.data_ptr()) == (memory > 0)
    assert list(folder.iterdir()) == []


def test_a_tensor_on_disk_keeps_shape_and_values_of_strided_and_scalar_tensors(folder):
    values = torch.randn(6, 4, dtype=torch.float64)
    for value in (values.t(), values[:, 1], torch.tensor(3.5, dtype=torch.float64)):
        assert torch.equal(on_disk(value), value)
    assert list(folder.iterdir()) == []


def test_edits_stay_in_memory_where_the_disk_is_full(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    twin = promote_program(canonical_program("llama"), 0)
    exact = twin.weight("model.norm.weight") / 3
    twin.set_weight("model.norm.weight", exact)
    assert torch.equal(twin.weight("model.norm.weight"), exact)


@pytest.mark.parametrize("memory", EVERYWHERE)
def test_a_pass_on_a_twin_rounds_nothing(memory):
    program = canonical_program("llama")
    inputs = program.examples[0]
    twin = promote_program(program, memory)
    RightFold().run(folded := twin.clone(), Context())
    exact = run_float64(program, inputs)[0]
    assert float((run_float64(folded, inputs)[0] - exact).abs().max()) < 1e-12
    # The interpreter in a program's own dtype, which on a twin is float64 too.
    promoted = [x.double() if x.is_floating_point() else x for x in inputs]
    own = run(folded, promoted)[0]
    assert own.dtype == torch.float64
    assert float((own - exact).abs().max()) < 1e-12


@pytest.mark.parametrize("memory", EVERYWHERE)
def test_models_of_any_size_are_held_to_the_same_number(monkeypatch, folder, memory):
    """An error of a millionth hides behind rounding in the model's own dtype."""
    monkeypatch.setattr("fxopt.pipeline.verify.EDITS_IN_MEMORY", memory)
    program = canonical_program("llama")
    manager = Manager(Verifier(program.examples[:2]))
    right = manager.run(program, [RightFold()]).history[-1]
    assert right.verification["error_float64"] <= 1e-12
    with pytest.raises(NotEquivalentError, match="'nudged-fold'.* in float64 .*Guilty site: model"):
        manager.run(program, [NudgedFold()])
    assert list(folder.iterdir()) == []


class Polar(torch.nn.Module):
    """Channels turned by complex factors, as some rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factors", torch.polar(torch.ones(8), torch.linspace(0, 3, 8)))

    def forward(self, x):
        return torch.view_as_real(x.to(self.factors.dtype) * self.factors)


def test_complex_numbers_are_as_wide_as_real_ones():
    assert promote(torch.complex64) == torch.complex128
    model, x = Polar(), torch.randn(3, 8)
    (result,) = run_float64(fxopt.capture(model, (x,)), [x])
    model.factors = model.factors.to(torch.complex128)
    torch.testing.assert_close(result, model(x.double()), rtol=0, atol=1e-15)
