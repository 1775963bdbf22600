"""fxopt::dynamic_linear_w8a8 on a GPU: the two Triton kernels one after the other."""

from torch import Tensor

from fxopt.kernels.dynamic_linear_w8a8.reference import check_dynamic_linear
from fxopt.kernels.linear_w8a8.triton import launch as launch_linear
from fxopt.kernels.quantize_per_token.triton import launch_rows

__all__ = ["launch"]


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pre_scale: Tensor | None = None,
) -> Tensor:
    """Quantize x [..., K] per token, then multiply by weight [N, K]; y [..., N] like x."""
    check_dynamic_linear(x, weight, weight_scale, weight_sum, bias, pre_scale)
    q, scale, zero_point = launch_rows(x, weight_sum is not None, pre_scale)
    return launch_linear(
        q, scale, zero_point, weight, weight_scale, weight_sum, bias, activation, x.dtype
    )
