"""fxopt::dynamic_gated_mlp_w8a8: a gated feed-forward block on int8 weights, in one operator.

    gate, up = split(dynamic_linear(x * pre_scale, gate_up_weight))
    y = dynamic_linear(activation(gate) * up * down_pre_scale, down_weight)

Shapes:
    x [..., K] floating; gate_up_weight [2F, K] int8, the gate rows first, then the up rows;
    gate_up_scale [2F] float32; gate_up_sum [2F] int32 or None; gate_up_bias [2F];
    down_weight [N, F] int8; down_scale [N] float32; down_sum [N] int32 or None; down_bias [N];
    pre_scale [K] and down_pre_scale [F] floating or None -> y [..., N] like x.

Both linears quantize their input per token, asymmetrically where the sum of their weight is given.
What lies between them stays in float32, so the result is rounded to the dtype of x once.
"""

from collections.abc import Callable

from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.feed_forward import Int8Linear, check_feed_forward, feed_forward
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_gated_mlp", "dynamic_gated_mlp_w8a8", "gated"]


def check_gated_mlp(
    x: Tensor,
    gate_up: Int8Linear,
    down: Int8Linear,
    pre_scale: Tensor | None,
    down_pre_scale: Tensor | None,
) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit."""
    rows = gate_up.weight.size(0)
    name = "dynamic_gated_mlp_w8a8"
    if rows % 2 != 0:
        raise KernelError(
            "gate_up_weight must have the gate rows and then as many up rows, "
            f"got {list(gate_up.weight.shape)}"
        )
    check_feed_forward(name, x, gate_up, down, rows // 2, pre_scale, down_pre_scale)


def gated(activation: str) -> Callable[[Tensor], Tensor]:
    """activation(gate) * up of the two halves of a tensor."""
    active = activation_function(activation)

    def hidden(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return active(gate) * up

    return hidden


@register_reference(
    "dynamic_gated_mlp_w8a8(Tensor x, Tensor gate_up_weight, Tensor gate_up_scale, "
    "Tensor? gate_up_sum, Tensor? gate_up_bias, Tensor down_weight, Tensor down_scale, "
    "Tensor? down_sum, Tensor? down_bias, str activation, "
    "Tensor? pre_scale=None, Tensor? down_pre_scale=None) -> Tensor"
)
def dynamic_gated_mlp_w8a8(
    x: Tensor,
    gate_up_weight: Tensor,
    gate_up_scale: Tensor,
    gate_up_sum: Tensor | None,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_scale: Tensor,
    down_sum: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
    down_pre_scale: Tensor | None = None,
) -> Tensor:
    """Gated feed-forward block; see the module's equation."""
    gate_up = Int8Linear(gate_up_weight, gate_up_scale, gate_up_sum, gate_up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_gated_mlp(x, gate_up, down, pre_scale, down_pre_scale)
    hidden = gated(activation)
    return feed_forward(linear_w8a8, x, gate_up, down, hidden, pre_scale, down_pre_scale)


@register_fake("dynamic_gated_mlp_w8a8")
def _(
    x: Tensor,
    gate_up_weight: Tensor,
    gate_up_scale: Tensor,
    gate_up_sum: Tensor | None,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_scale: Tensor,
    down_sum: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
    down_pre_scale: Tensor | None = None,
) -> Tensor:
    gate_up = Int8Linear(gate_up_weight, gate_up_scale, gate_up_sum, gate_up_bias)
    down = Int8Linear(down_weight, down_scale, down_sum, down_bias)
    check_gated_mlp(x, gate_up, down, pre_scale, down_pre_scale)
    activation_function(activation)
    return x.new_empty((*x.shape[:-1], down_weight.size(0)))
