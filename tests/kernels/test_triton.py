import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fxopt.kernels import KERNELS
from tests.kernels.cases import (
    DTYPE_IDS,
    FLOATING,
    LINEAR_SHAPES,
    dynamic_cases,
    int8,
    pre_scale_of,
    weight_of,
)
from tests.kernels.tolerances import assert_close

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_lane(lane: str, tmp_path: Path, **variables: str) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_lanes", lane],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split()[0])


def older(version: str, major: int, minor: int) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) < (major, minor)


@pytest.mark.interpreter
@pytest.mark.skipif(
    older(triton.__version__, 3, 7) and not older(np.__version__, 2, 5),
    reason="the interpreter of triton 3.6 makes numbers of arrays, which numpy 2.5 refuses",
)
def test_interpreted_kernels_are_the_reference(tmp_path):
    assert run_lane("interpreter", tmp_path, TRITON_INTERPRET="1") == 92


@pytest.mark.compile_only
def test_kernels_compile_without_spilling(tmp_path):
    assert run_lane("compile_only", tmp_path) == 68


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 7), (4, 0), (33, 70), (2, 3, 5000)])
def test_quantize_on_a_gpu(shape, dtype):
    x = torch.randn(shape).to(dtype).cuda()
    kernel = KERNELS["quantize_per_token"]
    for pre_scale in (None, pre_scale_of(shape[-1]).cuda()):
        results = (function(x, pre_scale) for function in (kernel.overload, kernel.reference))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_linear_on_a_gpu(lead, k, n, dtype):
    weight, weight_scale, bias = weight_of(n, k)
    scale = torch.rand(*lead, 1) * 0.02
    zero = torch.randint(-128, 128, scale.shape, dtype=torch.int32)
    total = weight.sum(1, dtype=torch.int32)
    tensors = (int8(*lead, k), scale, zero, weight, weight_scale, total, bias)
    args = (*(tensor.cuda() for tensor in tensors), "gelu", dtype)
    kernel = KERNELS["linear_w8a8"]
    assert_close("linear_w8a8", kernel.overload(*args), kernel.reference(*args))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("m", [1, 17, 65, 600])
def test_dynamic_operators_on_a_gpu(m):
    x = torch.randn(m, 96).bfloat16()
    for name, args in dynamic_cases(x, weight_of(256, 96), weight_of(80, 128)):
        args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        kernel = KERNELS[name]
        assert_close(name, kernel.overload(*args), kernel.reference(*args))
