"""Replaced weights wait on disk, and come back where something fails."""

import tempfile

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import LoweringError
from fxopt.pipeline import parking
from fxopt.pipeline.parking import Parking

DYNAMIC = "w8a8-dynamic"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where temporary files go; every weight is worth one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(parking, "_WORTH_A_FILE", 0)
    return tmp_path


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype).eval()


def places(module: nn.Module) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in module.parameters()]


def parked(module: nn.Module) -> tuple[Parking, fxopt.Program]:
    before = fxopt.capture(module, (torch.randn(2, 16),))
    after = before.clone()
    after.set_weight("0.weight", torch.zeros(32, 16))
    holder = Parking()
    holder.watch(module, before)
    holder.park(before, after)
    return holder, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_replaced_moves_and_reads_the_same(folder, dtype):
    module = model(dtype)
    values = [tensor.clone() for tensor in module.parameters()]
    held = places(module)
    before = fxopt.capture(module, (torch.randn(2, 16, dtype=dtype),))
    after = before.clone()
    after.set_weight("0.weight", torch.zeros(32, 16, dtype=dtype))
    holder = Parking()
    holder.watch(module, before)
    holder.park(before, after)
    now = places(module)
    assert [a == b for a, b in zip(held, now, strict=True)] == [False, True, True, True]
    assert before.weight("0.weight").untyped_storage().data_ptr() == now[0]
    for tensor, value in zip(module.parameters(), values, strict=True):
        assert torch.equal(tensor, value)
    assert list(folder.iterdir()) == []


def test_restored_weights_are_in_memory_with_their_strides():
    module = model()
    module[0].weight.data = torch.randn(16, 32).t()
    value = module[0].weight.detach().clone()
    holder, _ = parked(module)
    on_disk = places(module)[0]
    holder.restore()
    assert places(module)[0] != on_disk
    assert module[0].weight.stride() == (1, 32)
    assert torch.equal(module[0].weight, value)


def test_an_error_brings_them_back_and_success_does_not():
    for fails in (True, False):
        module = model()
        holder, _ = parked(module)
        on_disk = places(module)[0]
        try:
            with holder:
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert (places(module)[0] != on_disk) == fails


def test_in_the_middle_of_a_pass_what_no_operator_reads_moves_once(monkeypatch):
    files: list[int] = []

    def counted(value: torch.Tensor) -> torch.Tensor:
        files.append(value.numel())
        return on_disk(value)

    on_disk = parking.on_disk
    monkeypatch.setattr(parking, "on_disk", counted)
    module = model()
    value = module[0].weight.detach().clone()
    held = places(module)
    before = fxopt.capture(module, (torch.randn(2, 16),))
    after = before.clone()
    holder = Parking()
    holder.watch(module, before)
    holder.park(before, after)
    assert places(module) == held
    linear = next(n for n in after.graph.nodes if n.op == "get_attr" and n.target == "0.weight")
    linear.replace_all_uses_with(linear.graph.get_attr("2.weight"))
    for _ in range(2):  # a pass tells each of its sites
        holder.park(before, after)
        assert [a == b for a, b in zip(held, places(module), strict=True)] == [False, *[True] * 3]
    assert files == [4 * 16 * 32]
    assert after.weight("0.weight").untyped_storage().data_ptr() == places(module)[0]
    assert torch.equal(after.weight("0.weight"), value)


def test_a_pass_gives_up_weights_as_it_goes(monkeypatch):
    parked_at: list[int] = []
    park = Parking.park

    def watched(self: Parking, before: fxopt.Program, after: fxopt.Program) -> None:
        park(self, before, after)
        parked_at.append(len(self.parked))

    monkeypatch.setattr(Parking, "park", watched)
    x = (torch.randn(2, 16),)
    fxopt.optimize(model(), ["canonicalize", "quantize"], example_inputs=x, inplace=True)
    # At the second of two sites the first weight has gone, and both before the pass is judged.
    assert parked_at[-3:] == [0, 1, 2]


def test_without_room_on_the_disk_they_stay(monkeypatch):
    def full(value: torch.Tensor) -> torch.Tensor:
        raise OSError("No space left on device")

    monkeypatch.setattr(parking, "on_disk", full)
    module = model()
    held = places(module)
    parked(module)
    assert places(module) == held


def test_a_model_given_up_comes_back_where_a_kernel_is_found_wrong(monkeypatch):
    wanted = dict.fromkeys([torch.float32], torch.nan)  # no kernel is that good
    monkeypatch.setattr("fxopt.pipeline.lowered_check.KERNEL_SQNR_DB", wanted)
    module, x = model(), torch.randn(2, 16)
    expected = module(x)
    with pytest.raises(LoweringError):
        fxopt.optimize(module, DYNAMIC, example_inputs=(x,), inplace=True)
    assert torch.equal(module(x), expected)


def test_a_model_that_stays_is_left_where_it_is():
    module = model()
    held = places(module)
    fxopt.optimize(module, DYNAMIC, example_inputs=(torch.randn(2, 16),))
    assert places(module) == held
