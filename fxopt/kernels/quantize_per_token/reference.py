"""fxopt::quantize_per_token: symmetric int8 with one scale per token.

    scale = max(max_k |x_k| / 127, tiny)        q = round_half_even(x / scale) in [-127, 127]

Shapes:
    x [..., K] floating -> q [..., K] int8, scale [..., 1] float32.

Computed in float32. A row of zeros gives zeros. A row with NaN or infinity gives zeros under a
scale that is not finite, so what is computed from it is NaN and not a plausible number.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["quantize_per_token"]

TINY = torch.finfo(torch.float32).tiny


def _check(x: Tensor) -> None:
    if x.dim() == 0:
        raise KernelError("quantize_per_token needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")


@register_reference("quantize_per_token(Tensor x) -> (Tensor q, Tensor scale)")
def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last axis; see the module's equation."""
    _check(x)
    if x.size(-1) == 0:
        scale = torch.full((*x.shape[:-1], 1), TINY, device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    rows = x.to(torch.float32).contiguous()
    absmax = rows.abs().amax(-1, keepdim=True)
    scale = (absmax / 127).clamp_min(TINY)
    q = torch.where(absmax.isfinite(), torch.round(rows / scale), 0.0)
    return q.to(torch.int8), scale


@register_fake("quantize_per_token")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
