"""fxopt::moe: a mixture of experts after routing, and the activations it knows."""

from collections.abc import Callable
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


# What a linear of an expert gives, from the rows it is shown and the expert's number.
ExpertLinear = Callable[[Tensor, int], Tensor]


def expert_hidden(product: Tensor, activation: str, gated: bool) -> Tensor:
    """What lies between the linears of an expert, [n, ff], from the first one's output."""
    if not gated:
        return activate(product, activation)
    gate, up = product.chunk(2, -1)
    return activate(gate, activation) * up


def mix_experts(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    down: Tensor,
    first: ExpertLinear,
    second: ExpertLinear,
    activation: str,
    gated: bool,
) -> Tensor:
    """The outputs of the experts that each token chose, weighed and summed; `down` tells sizes."""
    result = torch.zeros(x.shape[0], down.shape[1], dtype=x.dtype, device=x.device)
    for expert in expert_index.unique().tolist():
        if expert >= down.shape[0]:  # a token that is routed to no expert here
            continue
        token, choice = torch.where(expert_index == expert)
        hidden = expert_hidden(first(x[token], expert), activation, gated)
        out = second(hidden, expert)
        result.index_add_(0, token, (out * expert_weight[token, choice, None]).to(x.dtype))
    return result


def _linear(weight: Tensor, bias: Tensor | None) -> ExpertLinear:
    def linear(rows: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert]
        return torch.nn.functional.linear(rows, weight[expert], own)

    return linear


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
    first, second = _linear(gate_up, gate_up_bias), _linear(down, down_bias)
    return mix_experts(x, expert_index, expert_weight, down, first, second, activation, gated)


def _moe_fake(x: Tensor, expert_index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *_: Any):
    del expert_index, weight, up
    return x.new_empty(x.shape[0], down.shape[1])


define(
    "moe(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated) -> Tensor",
    _moe,
    _moe_fake,
)
