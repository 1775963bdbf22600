"""The operators of fxopt: each has a plain torch reference, and faster twins per device.

One folder per operator:

    fxopt/kernels/<operator>/
      reference.py   the schema, the definition in plain torch, and the fake for shapes
      cpu.cpp        native CPU code, registered with the dispatcher when the library is loaded
      cpu.py         the same in ATen operators, for machines that cannot build cpu.cpp
      triton.py      the GPU kernel; `launch` is what the CUDA dispatch key calls

The reference runs on every device and is the oracle of the tests; the others are optional. Native
code is compiled by `ensure_native()`, never by an import: whoever chooses a CPU kernel, or loads a
model that holds one, calls it first. Until then the reference answers.

To add an operator: write the folder; its reference.py calls `register_reference` and
`register_fake`, and its `__init__` names the Triton module by `register_cuda`; import the folder
here; put a test in `tests/kernels/test_<operator>.py`. A cpu.cpp is found by itself; it includes
the headers of `fxopt/kernels/native` and ends in `TORCH_LIBRARY_IMPL(fxopt, CPU, m)`.
"""

# transformers looks for a package called `kernels` and, in a checkout, finds the link in the root.
# It then reads this file under that name; importing anything here would be a cycle through it.
if __name__ == "fxopt.kernels":
    from fxopt.kernels import (
        add_layer_norm,
        apply_rope,
        dynamic_gated_mlp_w8a8,
        dynamic_linear_w8a8,
        dynamic_mlp_w8a8,
        embedding_int8,
        fused_attention,
        fused_rms_norm,
        gated_activation,
        linear_w4a16,
        linear_w8a8,
        linear_w8a16,
        moe_w4a16,
        moe_w8a16,
        norm_quantize,
        quantize_per_token,
    )
    from fxopt.kernels.activation import ACTIVATIONS
    from fxopt.kernels.native.build import NativeStatus, ensure_native, native_status
    from fxopt.kernels.registry import KERNELS, Kernel

__all__ = [
    "ACTIVATIONS",
    "KERNELS",
    "Kernel",
    "NativeStatus",
    "add_layer_norm",
    "apply_rope",
    "dynamic_gated_mlp_w8a8",
    "dynamic_linear_w8a8",
    "dynamic_mlp_w8a8",
    "embedding_int8",
    "ensure_native",
    "fused_attention",
    "fused_rms_norm",
    "gated_activation",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "moe_w4a16",
    "moe_w8a16",
    "native_status",
    "norm_quantize",
    "quantize_per_token",
]
