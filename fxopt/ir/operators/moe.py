"""fxopt::moe: a mixture of experts after routing, and the activations it knows."""

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.ir.operators.registration import define

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "identity")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name in `ACTIVATIONS`.

    Raises:
        KernelError: the name is not one of them.
    """
    functional = torch.nn.functional
    match activation:
        case "relu":
            return functional.relu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu":
            return functional.silu(x)
        case "tanh":
            return torch.tanh(x)
        case "identity":
            return x
        case _:
            raise KernelError(
                f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}."
            )


def _moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    result = torch.zeros(x.shape[0], down.shape[1], dtype=x.dtype, device=x.device)
    for expert in expert_index.unique().tolist():
        if expert >= gate_up.shape[0]:  # a token that is routed to no expert here
            continue
        token, choice = torch.where(expert_index == expert)
        hidden = torch.nn.functional.linear(
            x[token], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert]
        )
        if gated:
            gate, up = hidden.chunk(2, -1)
            hidden = activate(gate, activation) * up
        else:
            hidden = activate(hidden, activation)
        out = torch.nn.functional.linear(
            hidden, down[expert], None if down_bias is None else down_bias[expert]
        )
        result.index_add_(0, token, (out * expert_weight[token, choice, None]).to(x.dtype))
    return result


def _moe_fake(x: Tensor, expert_index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *_: Any):
    del expert_index, weight, up
    return x.new_empty(x.shape[0], down.shape[1])


define(
    "moe(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated) -> Tensor",
    _moe,
    _moe_fake,
)
