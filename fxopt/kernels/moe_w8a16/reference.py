"""fxopt::moe_w8a16: a mixture of experts with int8 weights, each expert's read where it is used.

    y_t = sum_j expert_weight[t, j] FFN_e(x_t),    e = expert_index[t, j]
    FFN_e(x) = down_e act(gate_up_e x + b_e) + c_e, or with a gate  down_e (act(g) * u) + c_e,
    g and u the halves of gate_up_e x + b_e

Shapes:
    x [T, K] floating; expert_index [T, k] integers, E or more for no expert; expert_weight [T, k];
    gate_up [E, F, K] int8 with scale [E, F] float32, gate_up_bias [E, F] or None; down [E, N, H]
    int8 with scale [E, N], down_bias [E, N] or None; H = F / 2 with a gate, else F
    -> y [T, N] of x's dtype.

Each linear is `fxopt::linear_w8a16`, of whatever device; only experts that were chosen are read.
"""

import torch
from torch import Tensor

from fxopt.ir.operators.moe import ExpertLinear, mix_experts
from fxopt.kernels.checks import check_experts, check_floating
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["moe_w8a16"]

ops = torch.ops.fxopt


def _linear(weight: Tensor, scale: Tensor, bias: Tensor | None) -> ExpertLinear:
    def linear(rows: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert]
        return ops.linear_w8a16(rows, weight[expert], scale[expert], own, "none")

    return linear


@register_reference(
    "moe_w8a16(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, bool gated) -> Tensor"
)
def moe_w8a16(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """A mixture of int8 experts; see the module's equation."""
    check_experts(x, expert_index, expert_weight, gate_up, down)
    first = _linear(gate_up, gate_up_scale, gate_up_bias)
    second = _linear(down, down_scale, down_bias)
    return mix_experts(x, expert_index, expert_weight, down, first, second, activation, gated)


@register_fake("moe_w8a16")
def _(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    *_: object,
) -> Tensor:
    check_floating(x.dtype, "x")
    return x.new_empty(x.shape[0], down.shape[1])
