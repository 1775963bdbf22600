"""The files of a saved folder: a manifest of hashes, and nothing in it that could run code."""

import hashlib
import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from fxopt.errors import LoadError

MANIFEST = "manifest.json"
FORMAT = "fxopt.folder"
FORMAT_VERSION = 1
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".pt2", ".joblib", ".dill"}

_CHUNK = 1 << 22
_HEAD = 1 << 16
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}


# --- manifest -------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """Record the size and hash of every file in a folder."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(_manifest_text(FORMAT_VERSION, files), "utf-8")


def _manifest_text(version: int, files: Any) -> str:
    content = {"format": FORMAT, "version": version, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a folder says it has.

    Raises:
        LoadError: the folder is not one of fxopt, newer than this fxopt, or its manifest altered.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise LoadError(f"there is no folder {str(folder)!r}. Check the path.")
    if not path.is_file():
        raise LoadError(
            f"{str(folder)!r} was not saved by fxopt: it has no {MANIFEST}. Give the folder that "
            "`save_pretrained` of an optimized model wrote."
        )
    try:
        text = path.read_text("utf-8")
        data: Any = json.loads(text)
        version, files, kind = data["version"], data["files"], data["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{MANIFEST} is damaged ({error}). Save the model again.") from error
    if kind != FORMAT:
        raise LoadError(f"{str(folder)!r} was not saved by fxopt: its manifest is of another kind.")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise LoadError(
            f"{str(folder)!r} has format {str(version)[:20]}, newer than this fxopt, which reads "
            f"{FORMAT_VERSION}. Upgrade with `pip install -U fxopt`."
        )
    if text != _manifest_text(version, files) or not isinstance(files, dict):
        raise LoadError(f"{MANIFEST} was altered after saving. Save the model again.")
    return files


def check_files(folder: Path, files: dict[str, dict[str, Any]], required: set[str]) -> None:
    """Check every file of a folder before any is read.

    Raises:
        LoadError: a file is missing, altered, outside the folder, or holds a pickle.
    """
    for name in sorted(required - set(files)):
        raise LoadError(f"{str(folder)!r} lists no {name}; it is incomplete. Save the model again.")
    for path in sorted(folder.rglob("*")):
        _refuse_link(folder, path)
    for name, facts in files.items():
        _check_file(folder, name, facts)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            refuse_pickle(path, path.relative_to(folder).as_posix())


def _refuse_link(folder: Path, path: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise LoadError(
            f"{path.relative_to(folder)} is a link to {path.resolve()}, outside the folder. "
            "Copy the file into the folder if you trust it."
        )


def _check_file(folder: Path, name: str, facts: Any) -> None:
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise LoadError(f"{MANIFEST} names {name[:80]!r}, which is no file of the folder.")
    path = folder / name
    if not path.is_file():
        raise LoadError(f"{name} is missing from {str(folder)!r}. Copy it again, or save again.")
    if not isinstance(facts, dict) or set(facts) != {"size", "sha256"}:
        raise LoadError(f"{MANIFEST} is damaged: what it says of {name} is incomplete.")
    size = path.stat().st_size
    if size != facts["size"]:
        raise LoadError(
            f"{name} has {size} bytes and was saved with {facts['size']}: it is truncated or "
            "altered. Copy it again, or save the model again."
        )
    if hash_file(path) != facts["sha256"]:
        raise LoadError(f"{name} was altered after saving (its hash differs). Save it again.")


# --- pickles --------------------------------------------------------------------------------


def refuse_pickle(path: Path, name: str) -> None:
    """Refuse a file that other software would unpickle; nothing in it is ever run here.

    Raises:
        LoadError: the file is a pickle by its name or by its content.
    """
    reason = None
    if path.suffix.lower() in PICKLE_SUFFIXES:
        reason = f"its name ends in {path.suffix}"
    elif _holds_pickle(path):
        reason = "its content is a pickle"
    if reason is not None:
        raise LoadError(
            f"{name} is a pickle ({reason}), which runs code when it is loaded. fxopt writes none: "
            "the folder was changed. Remove the file if you know where it comes from."
        )


def _holds_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if _is_safetensors(head, path.stat().st_size):
        return False
    if head[:2] == b"PK":
        return _zip_holds_pickle(path)
    return _is_pickle(head)


def _is_safetensors(head: bytes, size: int) -> bool:
    # The header's length comes first and may look like a pickle's first two bytes.
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _zip_holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if Path(member.filename).suffix.lower() in PICKLE_SUFFIXES:
                    return True
                with archive.open(member) as stream:
                    if _is_pickle(stream.read(_HEAD)):
                        return True
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError):
        return True  # starts like an archive and cannot be read: not to be trusted
    return False


def _is_pickle(head: bytes) -> bool:
    """Whether bytes read as a pickle; the opcodes are listed, never carried out."""
    opcodes: list[str] = []
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            opcodes.append(opcode.name)
    except Exception:  # not a pickle, or cut off; pickletools raises many kinds
        # Text is not mistaken for a pickle: protocol 2 and later begin with a byte of their own.
        return head[:1] == b"\x80" and len(opcodes) > 1
    return bool(_CALLS & {*opcodes}) or head[:1] == b"\x80"
