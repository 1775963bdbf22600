"""The Triton kernels without a GPU; each lane is a process of its own, started by test_triton.py.

    python -m tests.kernels.triton_lanes interpreter    (under TRITON_INTERPRET=1)
    python -m tests.kernels.triton_lanes compile_only

The variable must be set before a kernel is decorated, so the lanes cannot share a process.
"""

import shutil
import subprocess
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxopt.kernels import ACTIVATIONS, KERNELS
from fxopt.kernels.dynamic_gated_mlp_w8a8.triton import launch as launch_gated_mlp
from fxopt.kernels.dynamic_linear_w8a8.triton import launch as launch_dynamic_linear
from fxopt.kernels.linear_w8a8.triton import CONFIGS, GROUP_M, ODD_CONFIG, linear_w8a8_kernel
from fxopt.kernels.linear_w8a8.triton import launch as launch_linear
from fxopt.kernels.quantize_per_token.reference import quantize_rows
from fxopt.kernels.quantize_per_token.triton import launch_rows, quantize_per_token_kernel
from tests.kernels.cases import (
    FLOATING,
    dynamic_cases,
    int8,
    pre_scale_of,
    strided,
    weight_of,
)
from tests.kernels.tolerances import assert_close

SHAPES = [(1, 1, 1), (3, 5, 7), (33, 70, 45), (17, 64, 130), (127, 576, 40), (2, 4100, 3)]
LAUNCHES = {
    "dynamic_linear_w8a8": launch_dynamic_linear,
    "dynamic_gated_mlp_w8a8": launch_gated_mlp,
}
TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]


def poison_empty() -> None:
    """Fill what `torch.empty` returns, so that an element no kernel writes is noticed."""
    empty = torch.empty

    def poisoned(*size, **options):
        x = empty(*size, **options)
        return x.fill_(float("nan") if x.is_floating_point() else 101)

    torch.empty = poisoned


def interpreter() -> int:
    poison_empty()
    count = 0
    for (m, k, n), dtype in product(SHAPES, FLOATING):
        count += check_quantize(torch.randn(m, k).to(dtype))
        count += check_quantize(strided(torch.randn(2, m, k).to(dtype)))
        count += check_linear(m, k, n, dtype, "gelu", zero_point=True)
        count += check_linear(m, k, n, dtype, "none", static=True)
    count += check_special_rows()
    for activation in ACTIVATIONS:
        count += check_linear(5, 40, 20, torch.float32, activation, zero_point=True)
    return count + check_compositions()


def check_quantize(x: torch.Tensor) -> int:
    scales = (None, pre_scale_of(x.size(-1)).to(x.dtype))
    for asymmetric, pre_scale in product((False, True), scales):
        expected = quantize_rows(x, asymmetric, pre_scale)
        for actual, wanted in zip(launch_rows(x, asymmetric, pre_scale), expected, strict=True):
            if actual is None or wanted is None:
                assert actual is wanted
                continue
            assert torch.equal(actual.nan_to_num(-1.0), wanted.nan_to_num(-1.0)), x.shape
    return 1


def check_special_rows() -> int:
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    bad = torch.randn(4, 33)
    bad[1, 3], bad[2, 4], bad[3, 5] = float("nan"), float("inf"), -float("inf")
    empty = [torch.zeros(0, 5), torch.zeros(3, 0)]
    denormal = torch.tensor([[-190.0, 5.0, 0.0, 190.0]]) * 2.0**-149
    return sum(check_quantize(x) for x in (ties, bad, denormal, torch.zeros(2, 9), *empty))


def check_linear(m, k, n, dtype, activation, *, static=False, zero_point=False) -> int:
    weight, weight_scale, bias = weight_of(n, k)
    scale = torch.tensor([0.02]) if static else torch.rand(m, 1) * 0.02
    zero = torch.randint(-128, 128, scale.shape, dtype=torch.int32) if zero_point else None
    total = weight.sum(1, dtype=torch.int32) if zero_point else None
    bias = None if static else bias.to(dtype)
    args = (int8(m, k), scale, zero, weight, weight_scale, total, bias, activation, dtype)
    assert_close("linear_w8a8", launch_linear(*args), KERNELS["linear_w8a8"].reference(*args))
    return 1


def check_compositions() -> int:
    x = torch.randn(2, 3, 24).bfloat16()
    cases = list(dynamic_cases(x, weight_of(80, 24), weight_of(20, 40)))
    for name, args in cases:
        launch = LAUNCHES[name]
        assert_close(name, launch(*args), KERNELS[name].reference(*args))
    return len(cases)


def compile_only() -> int:
    count = 0
    for target in TARGETS:
        for dtype in ("fp32", "bf16", "fp16"):
            for asymmetric, scaled in product((False, True), repeat=2):
                compile_quantize(target, dtype, asymmetric=asymmetric, scaled=scaled)
                count += 1
        for config in CONFIGS:
            compile_linear(target, config, aligned=True)
            count += 1
        compile_linear(target, ODD_CONFIG, aligned=False)
        count += 1
    return count


def compile_quantize(target: GPUTarget, dtype: str, *, asymmetric: bool, scaled: bool) -> None:
    constants = {"HAS_PRE_SCALE": scaled, "ASYMMETRIC": asymmetric, "BLOCK_K": 1024}
    types = {
        "x": f"*{dtype}", "pre_scale": f"*{dtype}", "q": "*i8", "scale": "*fp32",
        "zero_point": "*i32", "K": "i32", "stride": "i64",
    }  # fmt: skip
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(quantize_per_token_kernel, signature, constexprs=constants)
    check_compiled(source, target, num_warps=4, num_stages=3)


def compile_linear(target: GPUTarget, config, *, aligned: bool) -> None:
    constants = {
        "HAS_ZERO_POINT": True, "HAS_BIAS": True, "ACTIVATION": "gelu", "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": GROUP_M,
    }  # fmt: skip
    types = {
        "q": "*i8", "scale": "*fp32", "zero_point": "*i32", "weight": "*i8",
        "weight_scale": "*fp32", "weight_sum": "*i32", "bias": "*fp32", "y": "*bf16",
        "M": "i32", "N": "i32", "K": "i32", "stride_q": "i64", "scale_step": "i32",
    }  # fmt: skip
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    divisible = {"q", "weight", "y"} | ({"N", "K", "stride_q"} if aligned else set())
    hints = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name in divisible
    }
    source = ASTSource(linear_w8a8_kernel, signature, constexprs=constants, attrs=hints)
    check_compiled(source, target, num_warps=config.num_warps, num_stages=config.num_stages)


def check_compiled(source: ASTSource, target: GPUTarget, **options) -> None:
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    if target.backend == "hip":
        assert compiled.asm["hsaco"]
        assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]
    else:
        assert compiled.asm["cubin"]
        used = resources(compiled.asm["cubin"])
        assert used is None or "STACK:0 " in used, (target, options, used)


def resources(cubin: bytes) -> str | None:
    """What cuobjdump says of registers and stack, or None where Triton does not bring it along."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("error")
    # numpy's, in the interpreter: exp overflows to infinity, as the sigmoid wants.
    warnings.simplefilter("ignore", RuntimeWarning)
    lane = {"interpreter": interpreter, "compile_only": compile_only}[sys.argv[1]]
    print(lane(), "checked")
