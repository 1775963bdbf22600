"""fxopt::gated_activation: the product in the middle of a gated feed-forward block.

    y = activation(gate) * up

Shapes:
    gate, up [..., F] of one dtype -> y [..., F] like gate.

The arithmetic is float32 (float64 for float64), rounded once.
"""

from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.activation import activation_function
from fxopt.kernels.checks import check_floating, check_same, compute_dtype
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["gated_activation"]


def _check(gate: Tensor, up: Tensor) -> None:
    check_same(gate, up, "gate and up")
    check_floating(gate.dtype, "gate")
    if gate.dim() == 0:
        raise KernelError("gated_activation needs a tensor [..., F], got a scalar")


@register_reference("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor")
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Activation times gate; see the module's equation."""
    _check(gate, up)
    dtype = compute_dtype(gate)
    y = activation_function(activation)(gate.to(dtype)) * up.to(dtype)
    return y.to(gate.dtype).contiguous()


@register_fake("gated_activation")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up)
    activation_function(activation)
    return gate.new_empty(gate.shape)
