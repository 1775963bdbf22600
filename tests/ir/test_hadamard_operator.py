"""fxopt::hadamard against the dense matrix, in a compiled function and in a saved program."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt
from fxopt.errors import KernelError
from fxopt.ir.hadamard import hadamard_matrix
from fxopt.ir.program import Level
from fxopt.runtime.folder import read_folder
from fxopt.runtime.stored_operators import name_of_target, target_of_name
from tests.tiny import save

hadamard = torch.ops.fxopt.hadamard
ORDERS = (1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 52, 56, 60, 64, 156, 172)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def dense(x, order):
    """x H by one matmul in float64."""
    blocks = x.double().reshape(*x.shape[:-1], x.shape[-1] // order, order)
    return (blocks @ hadamard_matrix(order)).reshape(x.shape)


def random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=120, deadline=None)
@given(
    shape=shapes, order=st.sampled_from(ORDERS), blocks=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_it_is_the_dense_matmul_and_keeps_norms(shape, order, blocks, seed):
    x = random(seed, *shape, blocks * order)
    y = hadamard(x, order)
    assert y.dtype == torch.float64
    assert y.shape == x.shape
    assert y.is_contiguous()
    assert torch.allclose(y, dense(x, order), rtol=0, atol=1e-12)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-7), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)]
)
@settings(max_examples=40, deadline=None)
@given(order=st.sampled_from(ORDERS), seed=st.integers(0, 999))
def test_narrow_types_are_rounded_once(dtype, bound, order, seed):
    x = random(seed, 3, 2 * order).to(dtype)
    y, expected = hadamard(x, order), dense(x, order)
    assert y.dtype == dtype
    # Half a unit in the last place of each result, and the noise of float32 sums.
    slack = 1e-6 * expected.abs().max()
    assert bool(((y.double() - expected).abs() <= bound * expected.abs() + slack).all())


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,), (3, 0), (1, 1, 1, 24)])
def test_empty_and_flat_shapes(shape):
    x = random(0, *shape)
    assert hadamard(x, 12).shape == x.shape
    assert torch.allclose(hadamard(x, 12), dense(x, 12))


def test_any_strides_and_no_write_to_the_input():
    x = random(1, 24, 5).t()
    before = x.clone()
    y = hadamard(x, 24)
    assert y.is_contiguous()
    assert torch.allclose(y, dense(x, 24))
    assert torch.equal(x, before)
    one = hadamard(before, 1)
    assert torch.equal(one, before)
    assert one.data_ptr() != before.data_ptr()


def test_a_power_of_two_undoes_itself():
    x = random(2, 7, 64)
    assert torch.allclose(hadamard(hadamard(x, 16), 16), x, rtol=0, atol=1e-13)


def test_a_spike_becomes_flat():
    y = hadamard(torch.eye(60)[7:8] * 100, 60)
    assert torch.allclose(y.abs(), torch.full_like(y, 100 / 60**0.5))


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(
    ("shape", "dtype", "order", "message"),
    [
        ((4, 18), torch.float32, 9, r"order 9; there is no.*supported_order"),
        ((4, 18), torch.float32, 0, r"order 0; there is no"),
        ((4, 18), torch.float32, 4, r"order 4 on a tensor \[4, 18\].*divides its last axis"),
        ((), torch.float32, 1, r"on a tensor \[\]"),
        ((4, 16), torch.int8, 4, r"on torch.int8.*floating point"),
    ],
)
def test_what_has_no_answer_is_refused(fake, shape, dtype, order, message):
    x = torch.zeros(shape, dtype=dtype, device="meta" if fake else "cpu")
    with pytest.raises(KernelError, match=message):
        hadamard(x, order)


class Rotated(torch.nn.Module):
    """A linear whose input is rotated, with the inverse rotation in its weight."""

    def __init__(self) -> None:
        super().__init__()
        weight = random(3, 6, 24)
        self.register_buffer("plain", weight)
        self.register_buffer("weight", dense(weight, 24))

    def forward(self, x):
        return torch.nn.functional.linear(hadamard(x, 24), self.weight)


def test_it_survives_compile_and_export():
    model, x = Rotated(), random(4, 2, 5, 24)
    expected = x @ model.plain.T
    assert torch.allclose(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=False)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert hadamard.default in calls
    longer = random(5, 3, 9, 24)
    assert torch.allclose(exported.module()(longer), longer @ model.plain.T)


def test_a_program_with_it_is_saved_and_loaded(tmp_path):
    name = name_of_target(hadamard.default)
    assert name == "fxopt.hadamard.default"
    assert target_of_name(name) is hadamard.default
    x = random(6, 2, 5, 24)
    program = fxopt.capture(Rotated().eval(), (x,))
    assert program.level == Level.CAPTURED
    save(tmp_path / "folder", program)
    loaded = read_folder(tmp_path / "folder").program
    assert [node.target for node in loaded.nodes()] == [node.target for node in program.nodes()]
    longer = random(7, 3, 4, 24)
    assert torch.equal(loaded.graph_module(longer)[0], program.graph_module(longer)[0])
