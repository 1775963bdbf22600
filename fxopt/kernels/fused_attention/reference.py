"""fxopt::fused_attention: `fxopt::attention` with the masks evaluated where they are used.

    p = softmax(cap * tanh(scale * q @ k.T / cap) + mask, sinks)
    y = p @ v

Shapes:
    q [B, H, S, D]; k [B, Hkv, T, D]; v [B, Hkv, T, E]; padding [B, T], true for the keys to keep;
    mask boolean or additive, broadcastable to [B, H, S, T]; sinks [H]
    -> y [B, H, S, E] in memory [B, S, H, E].

Query head h reads key head h // (H / Hkv). Query i stands at key i + T - S; `causal` hides the keys
behind it, and `window` those at its distance or farther. A query that sees no key gives zeros.
"""

import torch
from torch import Tensor

import fxopt.ir.operators  # noqa: F401  # pyright: ignore[reportUnusedImport]
from fxopt.errors import KernelError
from fxopt.kernels.registry import register_fake, register_reference

__all__ = ["check_attention", "fused_attention"]


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a KernelError for ranks and head counts that do not fit."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise KernelError(
            "q, k and v must be [B, H, S, D], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.size(1) % k.size(1) != 0 or k.size(1) != v.size(1):
        raise KernelError(
            f"the heads of q must be a multiple of those of k and v, got {q.size(1)}, "
            f"{k.size(1)} and {v.size(1)}"
        )


@register_reference(
    "fused_attention(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? mask, Tensor? sinks, "
    "float scale, bool causal, int? window, float? softcap) -> Tensor"
)
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Scaled dot-product attention; see the module's equation."""
    check_attention(q, k, v)
    return torch.ops.fxopt.attention(q, k, v, padding, mask, sinks, scale, causal, window, softcap)


@register_fake("fused_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    del mask, sinks, scale, causal, window, softcap
    check_attention(q, k, v)
    if padding is not None:
        check = torch._check  # pyright: ignore[reportPrivateUsage]
        check(padding.size(0) == q.size(0))
        check(padding.size(1) == k.size(2))
    batch, heads, length, _ = q.shape
    return q.new_empty((batch, length, heads, v.size(3))).transpose(1, 2)
