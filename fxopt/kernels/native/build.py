"""Compiles every operator's cpu.cpp into one library, once per machine, and loads it.

The library is cached under `$FXOPT_CACHE`, or `~/.cache/fxopt`, by a hash of the sources, the torch
version, the CPU's flags and the compiler. `FXOPT_NATIVE=0` switches native code off, and
`FXOPT_NATIVE_ARCH` names another architecture for the compiler than this machine's own. Where
nothing can be built the ATen implementations are installed instead, and `native_status` says why.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.kernels.registry import KERNELS, LIBRARY

__all__ = ["NativeStatus", "ensure_native", "native_status"]

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parents[1]
# Not from torch.utils.cpp_extension: it imports setuptools, which takes longer than all of fxopt.
TORCH = Path(torch.__file__).resolve().parent

# Trapping and errno are given up, which rint and sqrt need to become single instructions; NaN,
# infinity and rounding keep their meaning, so there is no -ffast-math.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")


@dataclass(frozen=True)
class NativeStatus:
    """Whether native CPU code runs, and the reason if not.

    Attributes:
        loaded: The native library is registered with the dispatcher.
        reason: Why not, or where the library came from.
        library: The loaded file.
        seconds: Time spent building and loading.
    """

    loaded: bool
    reason: str
    library: Path | None = None
    seconds: float = 0.0


_lock = threading.Lock()
_status: NativeStatus | None = None


def native_status() -> NativeStatus:
    """The state of native code; building nothing."""
    return _status or NativeStatus(False, "not asked for yet: ensure_native() builds and loads it")


def ensure_native() -> bool:
    """Build and load the native CPU kernels unless that is done; whether they run.

    The first call on a machine compiles for some seconds. Where that fails, the ATen
    implementations are installed and the reason is kept for `native_status`.
    """
    global _status
    with _lock:
        if _status is None:
            _status = _load_or_install()
        return _status.loaded


def _load_or_install() -> NativeStatus:
    started = time.perf_counter()
    try:
        library, reason = _library()
        torch.ops.load_library(str(library))
    except (_BuildError, OSError, RuntimeError) as error:
        logger.info("native kernels are off: %s", error)
        _install_aten()
        return NativeStatus(False, str(error), seconds=time.perf_counter() - started)
    return NativeStatus(True, reason, library, time.perf_counter() - started)


def _install_aten() -> None:
    for kernel in KERNELS.values():
        if kernel.aten is not None:
            LIBRARY.impl(kernel.name, kernel.aten, "CPU")


class _BuildError(Exception):
    """Native code cannot be built here."""


def _library() -> tuple[Path, str]:
    """The compiled library, and whether it was built or found."""
    if os.environ.get("FXOPT_NATIVE", "1") == "0":
        raise _BuildError("switched off by FXOPT_NATIVE=0")
    if sys.platform == "win32":
        raise _BuildError("native kernels need g++ or clang++, which Windows lacks")
    compiler = _compiler()
    folder = _cache_folder()
    library = folder / f"libfxopt-{_key(compiler)}.so"
    if library.exists():
        return library, "found in the cache"
    with _exclusive(folder / "build.lock"):
        if library.exists():
            return library, "built by another process"
        _build(compiler, library)
    return library, f"built with {compiler}"


def _compiler() -> str:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise _BuildError("no C++ compiler: none of $CXX, g++, clang++ and c++ was found")


def _cache_folder() -> Path:
    chosen = os.environ.get("FXOPT_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "fxopt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _BuildError(f"the cache folder {folder} cannot be made: {error}") from error
    return folder


def _sources() -> list[Path]:
    return sorted(PACKAGE.glob("*/cpu.cpp"))


def _headers() -> list[Path]:
    return sorted((PACKAGE / "native").glob("*.h"))


@functools.cache
def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _arch_flag() -> str:
    arch = os.environ.get("FXOPT_NATIVE_ARCH", "native")
    # Compilers for Arm spell "this very machine" with -mcpu.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return f"-march={arch}" if is_x86 or arch != "native" else "-mcpu=native"


def _compile_flags() -> list[str]:
    flags = [
        *FLAGS,
        _arch_flag(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    return flags


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    facts = [torch.__version__, platform.machine(), _cpu_flags(), *_compile_flags()]
    digest.update(version.stdout)
    digest.update("\n".join(facts).encode())
    for path in (*_sources(), *_headers(), Path(__file__)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _exclusive(path: Path) -> Generator[None]:
    """Hold the lock file, so that two processes do not build the same library twice."""
    import fcntl  # absent on Windows, where nothing is built

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _units(folder: Path) -> list[Path]:
    """The sources gathered into one file per core: torch's headers cost more than our code."""
    sources = _sources()
    count = max(1, min(os.cpu_count() or 1, len(sources)))
    units: list[Path] = []
    for index in range(count):
        unit = folder / f"unit{index}.cpp"
        unit.write_text("".join(f'#include "{path}"\n' for path in sources[index::count]))
        units.append(unit)
    return units


def _build(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        units = _units(Path(name))
        with ThreadPoolExecutor(len(units)) as pool:
            objects = list(pool.map(functools.partial(_compile, compiler), units))
        linked = Path(name) / library.name
        _run([compiler, *map(str, objects), *_link_flags(), "-o", str(linked)])
        os.replace(linked, library)


def _compile(compiler: str, unit: Path) -> Path:
    compiled = unit.with_suffix(".o")
    includes = [f"-I{ROOT}", f"-isystem{TORCH / 'include'}"]
    _run([compiler, *_compile_flags(), *includes, "-c", str(unit), "-o", str(compiled)])
    return compiled


def _link_flags() -> list[str]:
    """Link torch but no OpenMP: its symbols are those of the runtime torch has loaded.

    Linking with -fopenmp would load the system's runtime beside torch's, and two pools of threads
    would fight for the cores.
    """
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        return ["-dynamiclib", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", *libraries]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = done.stderr.strip()[-2000:]
        raise _BuildError(f"{Path(command[0]).name} failed ({done.returncode}): {message}")
