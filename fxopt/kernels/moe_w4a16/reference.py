"""fxopt::moe_w4a16: a mixture of experts with 4-bit weights, each expert's read where it is used.

    y_t = sum_j expert_weight[t, j] FFN_e(x_t),    e = expert_index[t, j]

FFN as in `fxopt::moe_w8a16`, its weights read as in `fxopt::linear_w4a16`.

Shapes:
    x [T, K] floating; expert_index [T, k] integers, E or more for no expert; expert_weight [T, k];
    gate_up [E, F, ceil(K / 2)] uint8 with scale [E, F, G] float32, zero_point the same int8 or
    None, gate_up_bias [E, F] or None, table [16] float32; down [E, N, ceil(H / 2)] likewise;
    H = F / 2 with a gate, else F
    -> y [T, N] of x's dtype.

Each linear is `fxopt::linear_w4a16`, of whatever device; only experts that were chosen are read.
"""

import torch
from torch import Tensor

from fxopt.ir.operators.moe import ExpertLinear, mix_experts
from fxopt.kernels.checks import check_experts, check_floating
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["moe_w4a16"]

ops = torch.ops.fxopt


def _linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, table: Tensor
) -> ExpertLinear:
    def linear(rows: Tensor, expert: int) -> Tensor:
        zero, own = (None if part is None else part[expert] for part in (zero_point, bias))
        parts = (codes[expert], scale[expert], zero, own)
        return ops.linear_w4a16(rows, *parts, "none", table, None, None, None)

    return linear


@register_reference(
    "moe_w4a16(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor? gate_up_zero_point, Tensor gate_up_table, Tensor down, "
    "Tensor down_scale, Tensor? down_zero_point, Tensor down_table, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, bool gated) -> Tensor"
)
def moe_w4a16(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero_point: Tensor | None,
    gate_up_table: Tensor,
    down: Tensor,
    down_scale: Tensor,
    down_zero_point: Tensor | None,
    down_table: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """A mixture of 4-bit experts; see the module's equation."""
    check_experts(x, expert_index, expert_weight, gate_up, down)
    first = _linear(gate_up, gate_up_scale, gate_up_zero_point, gate_up_bias, gate_up_table)
    second = _linear(down, down_scale, down_zero_point, down_bias, down_table)
    return mix_experts(x, expert_index, expert_weight, down, first, second, activation, gated)


@register_fake("moe_w4a16")
def _(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero_point: Tensor | None,
    gate_up_table: Tensor,
    down: Tensor,
    *_: object,
) -> Tensor:
    check_floating(x.dtype, "x")
    return x.new_empty(x.shape[0], down.shape[1])
