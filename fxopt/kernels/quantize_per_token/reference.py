"""fxopt::quantize_per_token: symmetric int8 with one scale per token.

    x = x * pre_scale
    scale = max(max_k |x_k| / 127, tiny)        q = round_half_even(x / scale) in [-127, 127]

Shapes:
    x [..., K] floating; pre_scale [K] floating or None -> q [..., K] int8, scale [..., 1] float32.

Computed in float32. The product with pre_scale stays in float32 and is not rounded to the dtype of
x: two bfloat16 or float16 numbers multiply exactly there, so that nothing is rounded before q.

A row of zeros gives zeros. A row with NaN or infinity gives zeros under a scale that is not finite,
so what is computed from it is NaN and not a plausible number.

`quantize_rows` offers the asymmetric variant to the operators that quantize what they read:

    low = min(0, min_k x_k)                     high = max(0, max_k x_k)
    scale = max((high - low) / 255, tiny)       zero_point = -128 - round_half_even(low / scale)
    q = clamp(round_half_even(x / scale) + zero_point, -128, 127)

which is `fxopt::choose_qparams` and `fxopt::quantize` on [-128, 127] with a block per token.
"""

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.checks import check_floating, check_pre_scale
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_rows", "quantize_per_token", "quantize_rows"]

TINY = torch.finfo(torch.float32).tiny


def check_rows(x: Tensor, pre_scale: Tensor | None) -> None:
    """Raise a KernelError for dtypes and sizes that do not fit."""
    if x.dim() == 0:
        raise KernelError("quantize_per_token needs a tensor [..., K], got a scalar")
    check_floating(x.dtype, "x")
    check_pre_scale(pre_scale, x.size(-1))


def _scaled(x: Tensor, pre_scale: Tensor | None) -> Tensor:
    """The product x * pre_scale in float32, contiguous."""
    rows = x.to(torch.float32).contiguous()
    return rows if pre_scale is None else rows * pre_scale.to(torch.float32).reshape(-1)


@register_reference(
    "quantize_per_token(Tensor x, Tensor? pre_scale=None) -> (Tensor q, Tensor scale)"
)
def quantize_per_token(x: Tensor, pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last axis; see the module's equation."""
    check_rows(x, pre_scale)
    if x.size(-1) == 0:
        scale = torch.full((*x.shape[:-1], 1), TINY, device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    rows = _scaled(x, pre_scale)
    absmax = rows.abs().amax(-1, keepdim=True)
    scale = (absmax / 127).clamp_min(TINY)
    q = torch.where(absmax.isfinite(), torch.round(rows / scale), 0.0)
    return q.to(torch.int8), scale


def quantize_rows(
    x: Tensor, asymmetric: bool, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The q and scale from above, and the int32 zero point [..., 1], which symmetric rows lack."""
    if not asymmetric:
        return *quantize_per_token(x, pre_scale), None
    check_rows(x, pre_scale)
    rows = _scaled(x, pre_scale)
    if x.size(-1) == 0:  # an empty row has no least value
        rows = rows.new_zeros((*x.shape[:-1], 1))
    low = rows.amin(-1, keepdim=True).clamp(max=0)
    high = rows.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp_min(TINY)
    finite = scale.isfinite()
    zero_point = -128 - torch.round(low / scale)
    q = (torch.round(rows / scale) + zero_point).clamp(-128, 127)
    q = torch.where(finite, q, 0.0).to(torch.int8)[..., : x.size(-1)]
    return q, scale, torch.where(finite, zero_point, 0.0).to(torch.int32)


@register_fake("quantize_per_token")
def _(x: Tensor, pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_rows(x, pre_scale)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
