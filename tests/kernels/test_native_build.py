import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt.kernels.native import build

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter: native code is loaded once per process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REPORT = """
import warnings, torch, fxopt.kernels as kernels
warnings.simplefilter("error")
status = kernels.native_status()
assert not status.loaded and "ensure_native" in status.reason
loaded = kernels.ensure_native()
assert kernels.ensure_native() == loaded == kernels.native_status().loaded
q = torch.full((40, 64), 127, dtype=torch.int8)
one = torch.ones(1)
y = torch.ops.fxopt.linear_w8a8(
    q, one, None, q, torch.ones(40), None, None, "none", torch.float32)
assert y.eq(127 * 127 * 64).all()
print(loaded, kernels.native_status().reason)
"""


def test_switched_off():
    assert python(REPORT, FXOPT_NATIVE="0").strip() == "False switched off by FXOPT_NATIVE=0"


def test_no_compiler(tmp_path):
    out = python(REPORT, PATH=str(tmp_path), CXX="", FXOPT_CACHE=str(tmp_path))
    assert out.startswith("False no C++ compiler")


def test_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    compiler.chmod(0o755)
    out = python(REPORT, CXX=str(compiler), FXOPT_CACHE=str(tmp_path / "cache"))
    assert out.startswith("False broken failed (3): no such luck")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    out = python(REPORT, FXOPT_CACHE=str(tmp_path / "file" / "cache"))
    assert out.startswith("False the cache folder")


def test_import_builds_nothing_and_imports_no_triton_kernel(tmp_path):
    code = (
        "import sys, fxopt.kernels\n"
        "print([name for name in sys.modules if name.startswith('fxopt') and 'triton' in name])"
    )
    assert python(code, FXOPT_CACHE=str(tmp_path / "cache")).strip() == "[]"
    assert not (tmp_path / "cache").exists()


def test_one_openmp_runtime(native):
    code = """
import torch, fxopt.kernels as kernels
def runtimes():  # torch's, and those that other packages bring along
    lines = open("/proc/self/maps").read().splitlines()
    return {line.split()[-1] for line in lines if "gomp" in line or "iomp" in line}
before = runtimes()
assert kernels.ensure_native()
torch.ops.fxopt.quantize_per_token(torch.randn(4096, 64))
print(runtimes() == before)
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert python(code).strip() == "True"


PORTABLE = """
import torch, fxopt.kernels as kernels
assert kernels.ensure_native(), kernels.native_status()
for m in (1, 3, 40):
    for k, n in ((64, 64), (33, 70), (4096, 5)):
        q = torch.full((m, k), 127, dtype=torch.int8)
        q[:, ::3] = -127
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        args = (q, torch.ones(m, 1), None, w, torch.ones(n), None, None, "none", torch.float64)
        assert torch.equal(torch.ops.fxopt.linear_w8a8(*args), (q.long() @ w.long().T).double())
        x = torch.randn(m, k)
        scale = torch.rand(n) / 73 / k**0.5
        codes = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)
        for name, args in (
            ("dynamic_linear_w8a8", (x, w, scale, None, None, "gelu")),
            ("dynamic_linear_w8a8", (x, w, scale, w.sum(1, dtype=torch.int32), None, "gelu")),
            ("dynamic_linear_w8a8", (x, w, scale, None, None, "gelu", torch.rand(k) + 0.5)),
            ("linear_w8a16", (x, w, scale, None, "gelu")),
            ("linear_w4a16", (x, codes, scale[:, None], None, None, "gelu", torch.randn(16),
                              None, None, None)),
        ):
            kernel = kernels.KERNELS[name]
            torch.testing.assert_close(
                kernel.overload(*args), kernel.reference(*args), rtol=2e-5, atol=2e-5)
        for dtype in (torch.bfloat16, torch.float16):
            q, scale = torch.ops.fxopt.quantize_per_token(x.to(dtype))
            expected = kernels.KERNELS["quantize_per_token"].reference(x.to(dtype))
            assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1])
for dtype in (torch.float32, torch.bfloat16):
    q, k = torch.randn(1, 6, 5, 33).to(dtype), torch.randn(1, 2, 70, 33).to(dtype)
    args = (q, k, k, None, None, None, 0.2, True, 9, 5.0)
    kernel = kernels.KERNELS["fused_attention"]
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        kernel.overload(*args), kernel.reference(*args), rtol=close, atol=close)
print("same")
"""


def test_a_cpu_without_vnni(native):
    if "avx2" not in build._cpu_flags():
        pytest.skip("needs a CPU that runs x86-64-v3")
    assert python(PORTABLE, FXOPT_NATIVE_ARCH="x86-64-v3").strip() == "same"


def test_the_key_covers_what_the_library_depends_on(monkeypatch):
    compiler = build._compiler()
    key = build._key(compiler)
    assert build._key(compiler) == key
    monkeypatch.setenv("FXOPT_NATIVE_ARCH", "x86-64-v2")
    assert build._key(compiler) != key
