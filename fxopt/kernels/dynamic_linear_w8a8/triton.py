"""fxopt::dynamic_linear_w8a8 on a GPU: the two Triton kernels one after the other."""

from torch import Tensor

from fxopt.kernels.linear_w8a8.triton import launch as launch_linear
from fxopt.kernels.quantize_per_token.triton import launch as launch_quantize

__all__ = ["launch"]


def launch(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Quantize x [..., K] per token, then multiply by weight [N, K]; y [..., N] like x."""
    q, scale = launch_quantize(x)
    return launch_linear(q, scale, None, weight, weight_scale, None, bias, activation, x.dtype)
