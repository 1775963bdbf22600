import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS, registry
from fxopt.kernels.registry import register_reference

# Of other kernels, which are native by themselves.
COMPOSED = {"moe_w4a16", "moe_w8a16"}


def test_every_kernel_is_complete():
    assert len(KERNELS) == 16
    for name, kernel in KERNELS.items():
        assert kernel.name == name
        assert kernel.overload is getattr(torch.ops.fxopt, name).default
        assert (kernel.folder / "reference.py").exists()
        assert ("cpu" in kernel.targets) == (name not in COMPOSED)
        if kernel.aten is not None:
            assert (kernel.folder / "cpu.py").exists()
        if kernel.cuda is not None:
            assert "cuda" in kernel.targets
            assert (kernel.folder / "triton.py").exists()


def test_defining_twice_raises():
    with pytest.raises(KernelError, match="fxopt::apply_rope is defined twice"):
        register_reference("apply_rope(Tensor x) -> Tensor")(lambda x: x)


def test_native_code_can_raise_a_kernel_error():
    with pytest.raises(KernelError, match="why"):
        torch.ops.fxopt.raise_kernel_error("why")
    assert callable(registry.raise_kernel_error)
