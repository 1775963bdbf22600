import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fxopt
from fxopt.errors import KernelError, LoadError
from fxopt.ir.signature import TensorSpec
from fxopt.runtime import stored_files
from fxopt.runtime.folder import read_folder
from tests.models import zoo_model
from tests.tiny import save, small_program


def edit_graph(folder: Path, change) -> None:
    """Change the graph as somebody would who knows how to write the hashes."""
    path = folder / "graph.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    reseal(folder)


def reseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    stored_files.write_manifest(folder)


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "config.json", "recipe.yaml"])
def test_missing_truncated_and_altered_files(name, copied):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1])
    with pytest.raises(LoadError, match=f"{name} has .* truncated or altered"):
        read_folder(copied)
    (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LoadError, match=f"{name} was altered"):
        read_folder(copied)
    (copied / name).unlink()
    with pytest.raises(LoadError, match=f"{name} is missing"):
        read_folder(copied)


def test_what_is_no_folder_of_fxopt(tmp_path):
    with pytest.raises(LoadError, match="there is no folder"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(LoadError, match="not saved by fxopt"):
        read_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 1, "files": {}}')
    with pytest.raises(LoadError, match="not saved by fxopt"):
        read_folder(tmp_path)


def test_newer_folders_are_refused(copied, monkeypatch):
    edit_graph(copied, lambda graph: graph.update(version=2, surprise=1))
    with pytest.raises(LoadError, match=r"graph.json has format 2, newer .*Upgrade"):
        read_folder(copied)
    (copied / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(stored_files, "FORMAT_VERSION", 9)
        stored_files.write_manifest(copied)
    with pytest.raises(LoadError, match=r"has format 9, newer .*Upgrade"):
        read_folder(copied)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_noticed(saved, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(sorted(entry.name for entry in saved.iterdir())))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    (folder / name).write_bytes(content)
    with pytest.raises(LoadError):
        read_folder(folder)
    shutil.rmtree(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_altered_content_with_right_hashes_raises_nothing_else(saved, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(["graph.json", "model.safetensors", "recipe.yaml"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    reseal(folder)
    with contextlib.suppress(LoadError):  # by luck the content may still be a model
        read_folder(folder)
    shutil.rmtree(folder)


def places(data, path=()):
    """Every place of plain data, as the keys that lead there."""
    listed = enumerate(data) if isinstance(data, list) else ()
    for key, value in data.items() if isinstance(data, dict) else listed:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "saved"
    fxopt.optimize(zoo_model("bert").model, "w8a8-dynamic", progress=False).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["config.json", "graph.json", "report.json"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_edited_values_with_right_hashes_raise_nothing_else(
    saved_bert, name, data, tmp_path_factory
):
    """Values of the wrong type may fail in lowering, in transformers, or in the report."""
    folder = tmp_path_factory.mktemp("edited") / "m"
    shutil.copytree(saved_bert, folder)
    content = json.loads((folder / name).read_text())
    *path, last = data.draw(st.sampled_from(list(places(content))))
    place = content
    for key in path:
        place = place[key]
    place[last] = data.draw(st.sampled_from(["x", "nan", None, -7, [], {}, [["x"]]]))
    (folder / name).write_text(json.dumps(content))
    reseal(folder)
    with contextlib.suppress(LoadError):  # by luck the content may still be a model
        str(fxopt.load(folder).report)
    shutil.rmtree(folder)


# --- hostile folders ------------------------------------------------------------------------


def set_node(index, **changes):
    return lambda graph: graph["nodes"][index].update(changes)


def double_node(graph):
    graph["nodes"].insert(0, dict(graph["nodes"][0]))


def weight_table(**changes):
    return lambda graph: graph["weights"]["layer.weight"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # nodes: 0 weight, 1 x, 2 add, 3 output
        (set_node(2, target="os.system"), "does not know"),
        (set_node(2, target="builtins.eval"), "does not know"),
        (set_node(2, target="aten.from_file.default"), "does not know"),
        (set_node(2, target="aten.save.default"), "does not know"),
        (set_node(2, target="aten.__class__.mro"), "does not know"),
        (set_node(2, target="aten._sparse_coo_tensor_unsafe.default"), "does not let"),
        (set_node(2, target="aten._sparse_csr_tensor_unsafe.default"), "does not let"),
        (set_node(2, target="aten._nested_view_from_buffer.default"), "does not let"),
        (set_node(2, target="aten.segment_reduce.default"), "does not let"),
        (set_node(2, target="aten._index_put_impl_.default"), "does not let"),
        (set_node(2, target="aten._unsafe_index.Tensor"), "does not let"),
        (set_node(2, target="aten._embedding_bag.default"), "does not let"),
        (set_node(2, target="aten.embedding_bag.default"), "does not let"),
        (set_node(2, target="aten.max_pool2d_with_indices_backward.default"), "does not let"),
        (set_node(2, target="aten.native_group_norm.default"), "does not let"),
        (set_node(2, target="aten.as_strided.default"), "does not let"),
        (set_node(2, target="aten.resize_.default"), "does not let"),
        (set_node(2, target="aten.set_.source_Tensor"), "does not let"),
        (set_node(2, target="aten.add.out"), "does not let"),
        (set_node(2, target="prims.as_strided.default"), "does not let"),
        (set_node(2, target="fxopt.from_the_future.default"), r"written by fxopt \S+; install"),
        (set_node(2, target="operator.mul", args=["a", 10**9]), "no number"),
        (set_node(2, args=[{"node": "add"}]), "does not stand before it"),
        (set_node(2, args=[{"node": "output"}]), "does not stand before it"),
        (set_node(2, args=[{"object": "os.system"}]), "argument that fxopt does not write"),
        (set_node(2, args=[{"dtype": "load"}]), "argument that fxopt does not write"),
        (set_node(2, args=[10**40]), "argument that fxopt does not write"),
        (set_node(2, args=[{"device": "cpu; rm"}]), "argument that fxopt does not write"),
        (set_node(2, kwargs={"a=print(1), b": 1}), "no name of a node"),
        (set_node(2, name="import"), "no name of a node"),
        (set_node(2, name="a b"), "no name of a node"),
        (set_node(1, target="x, y=print(1)"), "no name of a node"),
        (set_node(1, args=[1]), "input of the graph has arguments"),
        (set_node(1, op="call_method"), "not a graph of fxopt"),
        (set_node(0, target="gone.weight"), "which is not stored"),
        (set_node(0, target='x"), print("'), "which is not stored"),
        (double_node, "two nodes are called"),
        (lambda graph: graph["nodes"].reverse(), "no output at its end"),
        (lambda graph: graph["nodes"].pop(), "no output at its end"),
        (weight_table(shape=[4]), "the graph needs"),
        (weight_table(dtype="float16"), "the graph needs"),
        (weight_table(order=[1, 0]), "cannot lie in the order"),
        (weight_table(same_as="layer.weight"), "disagree"),
        (lambda graph: graph["weights"].update({"b": {"dtype": "x", "shape": []}}), "disagree"),
        (lambda graph: graph["weights"].clear(), "disagree"),
        (lambda graph: graph.update(level="SOLVED"), "not a graph of fxopt"),
        (lambda graph: graph.update(surprise=1), "not a graph of fxopt"),
        (lambda graph: graph["signature"].pop("inputs"), "has not the form"),
        (lambda graph: graph["signature"]["inputs"][0].update(dtype="load"), "no dtype"),
        (lambda graph: graph["signature"]["inputs"].append({}), "has not the form"),
        (
            lambda graph: graph["signature"].update(output_structure={"kind": "object"}),
            "unknown container",
        ),
        (
            lambda graph: graph["signature"].update(
                output_structure={"kind": "model_output", "class": "A", "fields": {"x=f()": {}}}
            ),
            "no name of a result",
        ),
        (
            lambda graph: graph["signature"].update(
                output_structure={"kind": "tensor", "index": 7}
            ),
            "a tensor that is not there",
        ),
        (lambda graph: graph["history"].append({"name": "x"}), "has not the form"),
    ],
)
def test_hostile_graphs_are_refused(change, message, copied):
    edit_graph(copied, change)
    with pytest.raises(LoadError, match=message):
        read_folder(copied)


@pytest.mark.parametrize(
    ("start", "column"),
    [([0, 1, 1], [1 << 28]), ([0, 1, 1], [-9]), ([0, 1 << 28, 1], [5]), ([9, 1, 1], [5])],
)
@pytest.mark.parametrize("rows", [2, 40])
def test_places_outside_a_weight_are_not_touched(rows, start, column, tmp_path):
    weights = {
        "codes": torch.zeros(2, 16, dtype=torch.uint8),
        "scale": torch.ones(2, 1),
        "table": torch.zeros(16),
        "start": torch.tensor(start).int(),
        "column": torch.tensor(column).int(),
        "value": torch.ones(1),
    }

    def build(graph, x, constants):
        codes, scale, table, *outliers = constants
        args = (x, codes, scale, None, None, "none", table, *outliers)
        return graph.call_function(torch.ops.fxopt.linear_w4a16.default, args)

    program = small_program(weights, build)
    wide, result = (TensorSpec(name, (rows, n), torch.float32) for name, n in (("x", 32), ("y", 2)))
    program.signature = dataclasses.replace(program.signature, inputs=(wide,), outputs=(result,))
    save(tmp_path / "m", program, config={}, report={})
    model = fxopt.load(tmp_path / "m")
    with pytest.raises(KernelError, match="outlier_"):
        model.run_flat([torch.randn(rows, 32)])


def test_names_of_weights_cannot_carry_code(copied):
    marker = copied.parent / "marker"
    name = f'x"), open("{marker}", "w").close(), getattr(self, "x'

    def change(graph):
        graph["weights"] = {name: graph["weights"]["layer.weight"]}
        graph["nodes"][0]["target"] = name

        save_file({name: torch.ones(3)}, copied / "model.safetensors")

    edit_graph(copied, change)
    with pytest.raises(LoadError, match="no name of a weight"):
        read_folder(copied)
    assert not marker.exists()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "notes.txt", "sub/data.json"])
def test_pickles_are_refused_and_never_run(name, protocol, copied):
    marker = copied.parent / "marker"
    path = copied / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(marker), protocol))
    with pytest.raises(LoadError, match=f"{name} is a pickle"):
        read_folder(copied)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "graph.json", "config.json", "recipe.yaml"])
def test_a_pickle_in_the_place_of_a_file(name, copied):
    marker = copied.parent / "marker"
    (copied / name).write_bytes(pickle.dumps(Bomb(marker)))
    reseal(copied)
    with pytest.raises(LoadError):
        read_folder(copied)
    assert not marker.exists()


def test_archives_with_pickles_are_refused(copied):
    torch.save({"x": Bomb(copied.parent / "marker")}, copied / "weights")
    with pytest.raises(LoadError, match="weights is a pickle"):
        read_folder(copied)
    with zipfile.ZipFile(copied / "weights", "w") as archive:
        archive.writestr("readme", "harmless")
    read_folder(copied)
    (copied / "weights").write_bytes(b"PK\x03\x04 and no archive")
    with pytest.raises(LoadError, match="weights is a pickle"):
        read_folder(copied)
    assert not (copied.parent / "marker").exists()


def test_python_objects_in_yaml_are_refused(copied):
    marker = copied.parent / "marker"
    (copied / "recipe.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']")
    reseal(copied)
    with pytest.raises(LoadError):
        read_folder(copied)
    assert not marker.exists()


def test_harmless_foreign_files_do_not_disturb(copied):
    (copied / "README.md").write_text("# A model\n.\n")
    (copied / "vocab.txt").write_text("the\n(of\nc\n")
    (copied / "empty").write_bytes(b"")
    (copied / "sub").mkdir()
    (copied / "sub" / "other.safetensors").write_bytes(
        (640).to_bytes(8, "little") + b"{}" + b" " * 700
    )
    read_folder(copied)


def test_nothing_outside_the_folder_is_read(copied, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (copied / "link").symlink_to(secret)
    with pytest.raises(LoadError, match="outside the folder"):
        read_folder(copied)
    (copied / "link").unlink()
    files = json.loads((copied / "manifest.json").read_text())["files"]
    files["../secret.json"] = {"size": 2, "sha256": stored_files.hash_file(secret)}
    (copied / "manifest.json").write_text(stored_files._manifest_text(1, files))
    with pytest.raises(LoadError, match="no file of the folder"):
        read_folder(copied)


def test_deep_data_is_refused(copied):
    deep = "[" * 100_000 + "]" * 100_000
    (copied / "config.json").write_text(f'{{"x": {deep}}}')
    reseal(copied)
    with pytest.raises(LoadError):
        read_folder(copied)
