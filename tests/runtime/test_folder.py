import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxopt.errors import LoadError, SaveError
from fxopt.ir.program import Level, PassRecord, Refusal, Site
from fxopt.ir.text import format_program
from fxopt.runtime.folder import read_folder
from tests.tiny import save, small_program, tiny_program

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
KINDS = ("llama", "bert", "t5")


# --- round trip -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_in_a_new_process_is_bit_equal(kind, tmp_path):
    program = tiny_program(kind)
    program.history.append(
        PassRecord("p", {"a": [1]}, (Site("x", "y"),), (Refusal("s", "r"),), notes=("n",))
    )
    program.level = Level.CANONICAL
    save(tmp_path / "model", program)
    inputs = program.examples[0]
    torch.save([inputs, list(program.graph_module(*inputs))], tmp_path / "wanted.pt")
    (tmp_path / "text").write_text(format_program(program, weights=True))
    script = """
import sys, torch
from pathlib import Path
from fxopt.ir.text import format_program
from fxopt.runtime.folder import read_folder
stored = read_folder("model")
inputs, wanted = torch.load("wanted.pt")
got = stored.program.graph_module(*inputs)
assert len(got) == len(wanted) and all(map(torch.equal, got, wanted))
assert format_program(stored.program, weights=True) == Path("text").read_text()
assert not [name for name in sys.modules if "modeling_llama" in name or "modeling_t5" in name]
print("bit-equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "bit-equal\n", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(kind, tmp_path):
    program = tiny_program(kind)
    program.layouts["x"] = "transposed"
    save(tmp_path / "m", program, generation_config={"g": 1})
    stored = read_folder(tmp_path / "m")
    back = stored.program
    assert stored.config == {"model_type": "tiny"}
    assert stored.generation_config == {"g": 1}
    assert stored.recipe == {"fxopt": 1, "name": "none", "passes": []}
    assert stored.report == {"bytes": 3}
    assert stored.extra == {"class": "Tiny", "list": [1, 2.5, None]}
    assert back.signature.to_dict() == program.signature.to_dict()
    assert (back.level, back.notes) == (program.level, program.notes)
    assert (back.aliases, back.layouts) == (program.aliases, program.layouts)
    old, new = list(program.graph.nodes), list(back.graph.nodes)
    assert [(n.name, n.target) for n in old] == [(n.name, n.target) for n in new]
    for before, after in zip(old, new, strict=True):
        assert before.meta.get("module_path", "") == after.meta["module_path"]
        assert before.meta.get("from_node", []) == after.meta["from_node"]
    assert all(torch.equal(t, back.weight(n)) for n, t in program.weights().items())


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_recomputed_with_their_names(kind, tmp_path):
    program = tiny_program(kind)
    save(tmp_path / "m", program)
    assert format_program(read_folder(tmp_path / "m").program) == format_program(program)
    without = read_folder(tmp_path / "m", shapes=False).program
    assert not any("val" in node.meta for node in without.graph.nodes)
    save(tmp_path / "again", without)
    again = read_folder(tmp_path / "again").program
    assert format_program(again, types=False) == format_program(program, types=False)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        torch.float8_e4m3fn,
    ],
)
def test_every_dtype_is_bit_exact(dtype, tmp_path):
    bits = torch.arange(64, dtype=torch.uint8).repeat(4)
    weight = bits % 2 == 1 if dtype == torch.bool else bits.view(dtype)
    save(tmp_path / "m", small_program({"w": weight, "b": torch.ones(3)}))
    back = read_folder(tmp_path / "m").program.weight("w")
    assert back.dtype == dtype
    assert torch.equal(back.contiguous().view(torch.uint8), weight.view(torch.uint8))


def test_special_values_and_empty_and_scalar_weights(tmp_path):
    weights = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
    }
    save(tmp_path / "m", small_program(weights))
    back = read_folder(tmp_path / "m").program.weights()
    assert torch.equal(back["nan"].view(torch.int32), weights["nan"].view(torch.int32))
    assert back["empty"].shape == (0, 4)
    assert back["scalar"].shape == ()
    assert back["scalar"] == 7


def test_shared_and_strided_weights(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    weights = {
        "base": base,
        "same": base,
        "transposed": torch.arange(24.0).reshape(4, 6).T,
        "part": base[1],
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "reshaped": base.reshape(6, 4),
    }
    program = small_program(weights)
    save(tmp_path / "m", program)
    back = read_folder(tmp_path / "m").program
    for name, tensor in weights.items():
        assert torch.equal(back.weight(name), tensor)
    assert back.weight("base").data_ptr() == back.weight("same").data_ptr()
    assert back.weight("transposed").stride() == (1, 6)
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4 * (
        24 + 24 + 12 + 16 + 5 + 24
    ) + 750


def test_arguments_of_every_kind(tmp_path):
    def build(graph, x, constants):
        out = graph.call_function(aten.full.default, ([3], float("inf")), {"dtype": torch.float32})
        out = graph.call_function(
            aten.empty_like.default,
            (out,),
            {
                "dtype": torch.bfloat16,
                "layout": torch.strided,
                "device": torch.device("cpu"),
                "memory_format": torch.preserve_format,
            },
        )
        size = graph.call_function(aten.sym_size.int, (x, 0))
        size = graph.call_function(operator.mul, (size, 1))
        graph.call_function(torch.sym_max, (size, 2))
        part = graph.call_function(operator.getitem, (x, (slice(None, size, 2), None, ...)))
        graph.call_function(aten.gelu.default, (part,), {"approximate": "tanh"})
        graph.call_function(aten.mul.Scalar, (x, -0.0))
        graph.call_function(aten.mul.Scalar, (x, complex(1, float("-inf"))))
        return graph.call_function(aten.add.Tensor, (x, constants[0]))

    program = small_program(build=build)
    save(tmp_path / "m", program)
    back = read_folder(tmp_path / "m").program
    for before, after in zip(program.graph.nodes, back.graph.nodes, strict=True):
        assert before.target is after.target or before.target == after.target
        assert repr(before.args) == repr(after.args)
        assert repr(before.kwargs) == repr(after.kwargs)


def test_operators_of_kernels_load_by_themselves(tmp_path):
    import fxopt.kernels

    overload = next(iter(fxopt.kernels.KERNELS.values())).overload
    name = str(overload)
    script = f"""
from fxopt.runtime.stored_operators import target_of_name
assert str(target_of_name({name!r})) == {name!r}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


# --- saving ---------------------------------------------------------------------------------


def test_an_existing_model_is_replaced_and_foreign_files_are_kept(copied):
    (copied / "tokenizer.json").write_text("{}")
    (copied / "pooling").mkdir()
    (copied / "pooling" / "config.json").write_text("{}")
    save(copied, small_program({"w": torch.zeros(3)}))
    stored = read_folder(copied)
    assert list(stored.program.weights()) == ["w"]
    assert stored.generation_config is None
    assert (copied / "tokenizer.json").exists()
    assert (copied / "pooling" / "config.json").exists()
    assert [entry.name for entry in copied.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("kind", ["file", "foreign folder", "link"])
def test_other_things_are_not_replaced(kind, tmp_path):
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match=r"another path|path of a folder"):
        save(path, small_program())
    assert not (tmp_path / "elsewhere" / "graph.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"dtype": torch.float32}}, "configuration is not plain data"),
        ({"report": {"x": {1, 2}}}, "report is not plain data"),
        ({"recipe": {"x": object()}}, "recipe is not plain data"),
    ],
)
def test_a_failed_save_leaves_nothing(changes, message, tmp_path):
    with pytest.raises(SaveError, match=message):
        save(tmp_path / "m", small_program(), **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_model(copied, monkeypatch):
    before = (copied / "graph.json").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SaveError, match="no space left"):
        save(copied, small_program({"w": torch.zeros(3)}))
    monkeypatch.undo()
    assert (copied / "graph.json").read_bytes() == before
    assert [entry.name for entry in copied.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, None, 5])
def test_what_is_no_path_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match="is not the path of a folder"):
        save(path, small_program())
    with pytest.raises(LoadError):
        read_folder(path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_named(tmp_path):
    def foreign(graph, x, constants):
        return graph.call_function(torch.nn.functional.relu, (x,))

    def odd_argument(graph, x, constants):
        return graph.call_function(aten.add.Tensor, (x, b"bytes"))

    for build, message in ((foreign, "cannot name"), (odd_argument, "argument of type bytes")):
        with pytest.raises(SaveError, match=message):
            save(tmp_path / "m", small_program(build=build))
    with pytest.raises(SaveError, match="meta device"):
        save(tmp_path / "m", small_program({"w": torch.empty(3, device="meta")}))
    with pytest.raises(SaveError, match="sparse"):
        save(tmp_path / "m", small_program({"w": torch.eye(3).to_sparse()}))
    assert list(tmp_path.iterdir()) == []
