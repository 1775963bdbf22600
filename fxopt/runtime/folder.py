"""A saved model is a folder of plain data: written whole or not at all, checked before it is read.

config.json             the model's own configuration
generation_config.json  where the model generates
model.safetensors       every weight once
graph.json              the program
recipe.yaml             the resolved recipe
report.json             what each pass did
manifest.json           size and hash of all of these
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fxopt.errors import FxoptError, LoadError, SaveError
from fxopt.ir.program import Program
from fxopt.runtime.stored_files import MANIFEST, check_files, read_manifest, write_manifest
from fxopt.runtime.stored_graph import FORMAT_VERSION, decode_graph, encode_graph, parse_graph
from fxopt.runtime.stored_shapes import restore_shapes
from fxopt.runtime.stored_weights import read_weights, write_weights

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
GRAPH = "graph.json"
RECIPE = "recipe.yaml"
REPORT = "report.json"
REQUIRED = {CONFIG, WEIGHTS, GRAPH, RECIPE, REPORT}


@dataclass(frozen=True)
class StoredModel:
    """What a saved folder holds."""

    program: Program
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    recipe: dict[str, Any]
    report: dict[str, Any]
    extra: dict[str, Any]


# --- writing --------------------------------------------------------------------------------


def write_folder(
    path: str | Path,
    program: Program,
    *,
    config: dict[str, Any] | None,
    generation_config: dict[str, Any] | None,
    recipe: dict[str, Any],
    report: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Save a program and what belongs to it.

    The folder is written beside `path` and renamed at the end, so a failure leaves `path` as it
    was. A folder that fxopt wrote before is replaced; files that others put into it are kept.

    Raises:
        SaveError: `path` is something else, or something cannot be stored.
    """
    path = _destination(path)
    with _new_folder(path) as folder:
        _write_json(folder / CONFIG, config or {}, "the configuration")
        if generation_config is not None:
            _write_json(folder / GENERATION_CONFIG, generation_config, "the generation config")
        _write_json(folder / REPORT, report, "the report")
        (folder / RECIPE).write_text(_yaml(recipe), "utf-8")
        table = write_weights(folder / WEIGHTS, program)
        # safetensors writes a private file; the others follow the user's umask.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
        graph = encode_graph(program, table, extra).model_dump(exclude_defaults=True)
        graph = {"format": "fxopt.program", "version": FORMAT_VERSION, **graph}
        _write_json(folder / GRAPH, graph, "the graph")
        write_manifest(folder)
        _keep_foreign_files(path, folder)


def _destination(path: str | Path) -> Path:
    try:
        found = Path(path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.lstat()  # a character or a length that no path has fails here
    except (TypeError, ValueError, OSError) as error:
        raise SaveError(
            f"{str(path)!r} is not the path of a folder: {error}. Give another path."
        ) from error
    check_destination(found)
    return found


def check_destination(path: Path) -> None:
    """Refuse a path that `write_folder` would not write to.

    Raises:
        SaveError: something else is there, or no folder can be made there.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise SaveError(f"{str(path)!r} exists and is no folder. Give the path of a folder.")
    if path.is_dir() and any(path.iterdir()) and not _is_own(path):
        raise SaveError(
            f"{str(path)!r} is not empty and was not saved by fxopt, so it is not replaced. Give "
            "another path, or remove the folder; save tokenizers after the model."
        )
    parent = next(place for place in path.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SaveError(
            f"{str(path)!r} could not be written: no folder can be made in {str(parent)!r}. Give "
            "another path."
        )


def _is_own(path: Path) -> bool:
    # A folder whose manifest is damaged is still recognized by it: saving again repairs it.
    try:
        return '"fxopt.folder"' in (path / MANIFEST).read_text("utf-8", errors="replace")
    except OSError:
        return False


@contextlib.contextmanager
def _new_folder(path: Path) -> Generator[Path]:
    """A temporary folder that takes the place of `path` when the block succeeds."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        if path.exists():
            path.rename(temporary / "old")
        try:
            folder.rename(path)
        except OSError:
            if (temporary / "old").exists():
                (temporary / "old").rename(path)
            raise
    except OSError as error:
        raise SaveError(
            f"{str(path)!r} could not be written: {error}. Nothing was changed."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _keep_foreign_files(old: Path, new: Path) -> None:
    """Copy what others put beside a saved model, a tokenizer for instance."""
    if not old.is_dir():
        return
    own = {*REQUIRED, GENERATION_CONFIG, MANIFEST}
    for entry in old.iterdir():
        if entry.name in own:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _write_json(path: Path, data: Any, what: str) -> None:
    try:
        text = json.dumps(data, indent=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise SaveError(f"{what} is not plain data and cannot be stored: {error}") from error
    path.write_text(text + "\n", "utf-8")


def _yaml(data: dict[str, Any]) -> str:
    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, RecursionError) as error:
        raise SaveError(f"the recipe is not plain data and cannot be stored: {error}") from error


# --- reading --------------------------------------------------------------------------------


def read_folder(path: str | Path, *, shapes: bool = True) -> StoredModel:
    """Load what `write_folder` wrote; no code of the folder runs, no module it names is imported.

    Args:
        path: the folder.
        shapes: recompute the shapes recorded on each node, where that is possible.

    Raises:
        LoadError: the folder is damaged, foreign, newer than this fxopt, or unsafe.
    """
    with fit_for_use(path):
        try:
            return _read(Path(path), shapes)
        except LoadError:
            raise
        except FxoptError as error:
            raise LoadError(f"{str(path)!r} cannot be loaded: {error}") from error


@contextlib.contextmanager
def fit_for_use(path: str | Path) -> Generator[None]:
    """Data of the wrong form may fail anywhere; whatever it fails with is a LoadError.

    Raises:
        LoadError: anything failed that is no error of fxopt.
    """
    try:
        yield
    except FxoptError:
        raise
    except OSError as error:
        raise LoadError(f"{str(path)!r} cannot be read: {error}. Check the path.") from error
    except Exception as error:
        raise LoadError(
            f"{str(path)!r} cannot be loaded: its data has not the form that fxopt writes "
            f"({type(error).__name__}: {str(error)[:200]}). Save the model again."
        ) from error


def _read(path: Path, shapes: bool) -> StoredModel:
    files = read_manifest(path)
    check_files(path, files, REQUIRED)
    text = (path / GRAPH).read_text("utf-8")
    _check_version(text)
    stored = parse_graph(text)
    weights = read_weights(path / WEIGHTS, stored.weights)
    program = decode_graph(stored, weights)
    if shapes:
        restore_shapes(program, stored.sizes)
    has_generation = GENERATION_CONFIG in files
    return StoredModel(
        program=program,
        config=_read_json(path / CONFIG),
        generation_config=_read_json(path / GENERATION_CONFIG) if has_generation else None,
        recipe=_mapping(yaml.safe_load((path / RECIPE).read_text("utf-8")), RECIPE),
        report=_read_json(path / REPORT),
        extra=stored.extra,
    )


def _check_version(text: str) -> None:
    # Before the form is checked: a newer form is not a damaged one.
    data = _mapping(json.loads(text), GRAPH)
    version = data.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LoadError(
            f"{GRAPH} has format {version}, newer than this fxopt, which reads {FORMAT_VERSION}. "
            "Upgrade with `pip install -U fxopt`."
        )


def _read_json(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text("utf-8")), path.name)


def _mapping(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise LoadError(f"{name} holds a {type(data).__name__}, not a mapping. Save again.")
    return data
