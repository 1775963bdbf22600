"""How far an implementation may lie from its reference: |y - y_ref| <= tolerance * max(1, |y_ref|).

One table. Between correct implementations of one float32 formula lie a few roundings, amplified by
nothing; a result in a short type may land on the neighbouring number, one unit in the last place.
"""

import torch
from torch import Tensor

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # The same operations in the same order.
    "quantize_per_token": dict.fromkeys(ULP, 0.0),
    "embedding_int8": dict.fromkeys(ULP, 0.0),
    # 1.1e-6 is torch's own error in float32 gelu.
    "linear_w8a8": {**ULP, torch.float32: 3e-6},
    "dynamic_linear_w8a8": {**ULP, torch.float32: 3e-6},
    # A last bit of the hidden row can move it across a rounding boundary: one step of its scale.
    "dynamic_gated_mlp_w8a8": dict.fromkeys(ULP, 2e-2),
    "dynamic_mlp_w8a8": dict.fromkeys(ULP, 2e-2),
    # Sums in another order; many rows of bfloat16 are rounded before the scale as well.
    "linear_w8a16": {
        torch.float32: 2e-5,
        torch.bfloat16: 2 * ULP[torch.bfloat16],
        torch.float16: ULP[torch.float16],
    },
    # As above; many rows of bfloat16 meet a weight that is rounded to bfloat16.
    "linear_w4a16": {
        torch.float32: 2e-5,
        torch.bfloat16: 4 * ULP[torch.bfloat16],
        torch.float16: ULP[torch.float16],
    },
    # Three roundings of linears and the sum over experts, in the dtype of the input.
    "moe_w8a16": {
        torch.float32: 4e-5,
        torch.bfloat16: 8 * ULP[torch.bfloat16],
        torch.float16: 4 * ULP[torch.float16],
    },
    "moe_w4a16": {
        torch.float32: 4e-5,
        torch.bfloat16: 12 * ULP[torch.bfloat16],
        torch.float16: 4 * ULP[torch.float16],
    },
    "fused_rms_norm": {**ULP, torch.float32: 2e-6},
    "add_layer_norm": {**ULP, torch.float32: 5e-6},
    "norm_quantize": {**ULP, torch.float32: 5e-6},
    "apply_rope": {**ULP, torch.float32: 1e-6},
    # Against float64. ATen rounds the weights of short types before it sums.
    "fused_attention": {
        torch.float32: 1e-5,
        torch.bfloat16: 2 * ULP[torch.bfloat16],
        torch.float16: 2 * ULP[torch.float16],
    },
    "gated_activation": {**ULP, torch.float32: 3e-6},
}

# Of the activations alone, against float64.
ACTIVATION_ERROR = 1e-6


def assert_close(op: str, actual: Tensor, expected: Tensor) -> None:
    """Assert that `actual` is `expected` within the operator's tolerance, NaN for NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    if actual.numel() == 0:
        return
    tolerance = TOLERANCES[op][actual.dtype] if actual.is_floating_point() else 0.0
    a, e = actual.double(), expected.double()
    assert torch.equal(a.isnan(), e.isnan())
    difference = torch.where(a == e, 0.0, (a - e).abs()).nan_to_num(0.0)
    error = (difference / e.abs().nan_to_num(0.0).clamp_min(1.0)).max().item()
    assert error <= tolerance, f"{op} {actual.dtype}: error {error:.3g} above {tolerance:.3g}"
