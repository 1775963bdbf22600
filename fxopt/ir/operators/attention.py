"""fxopt::attention: grouped-query attention with a structured mask."""

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.operators.registration import define


def attention_mask(
    query_length: int,
    key_length: int,
    padding: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """The boolean mask [B or 1, 1, S, T] that the structured arguments of `attention` stand for.

    Query i sits at key position p = i + T - S (the last query meets the last key):
    causal keeps j <= p, window keeps |p - j| < window, padding keeps the keys it marks True.
    None when every key is visible.
    """
    mask = None if padding is None else padding[:, None, None, :].to(torch.bool)
    if not causal and window is None:
        return mask
    position = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    key = torch.arange(key_length, device=device)[None, :]
    visible = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & ((position - key).abs() < window)
    visible = visible[None, None]
    return visible if mask is None else visible & mask


def _attention(
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
    structured = attention_mask(q.shape[2], k.shape[2], padding, causal, window, q.device)
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=merge_masks(structured, mask, q.dtype),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(compute) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return _masked_softmax(scores, structured, mask, sinks).to(q.dtype) @ v


def merge_masks(
    structured: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """One SDPA mask out of a boolean one and one that is boolean or additive."""
    if structured is None or mask is None:
        merged = mask if structured is None else structured
    elif mask.dtype == torch.bool:
        merged = structured & mask
    else:
        merged = torch.where(structured, mask, -torch.inf)
    return merged if merged is None or merged.dtype == torch.bool else merged.to(dtype)


def _masked_softmax(
    scores: Tensor, structured: Tensor | None, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    merged = merge_masks(structured, mask, scores.dtype)
    if merged is not None:
        if merged.dtype == torch.bool:
            scores = scores.masked_fill(~merged, -torch.inf)
        else:
            scores = scores + merged
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    # A row that sees no key is zero, as in SDPA, and not NaN.
    return torch.softmax(scores, -1).nan_to_num(0.0) if merged is not None else scores.softmax(-1)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, *_: Any) -> Tensor:
    if padding is not None:
        torch._check(padding.shape[0] == q.shape[0])  # pyright: ignore[reportPrivateUsage]
        torch._check(padding.shape[1] == k.shape[2])  # pyright: ignore[reportPrivateUsage]
    # SDPA gives [B, S, H, D] memory seen as [B, H, S, D]; the layout is part of the contract.
    batch, heads, length = q.shape[:3]
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


def attention_reference(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """softmax(scale q k^T + mask) v with grouped keys and values.

    Shapes: q [B, H, S, D]; k [B, Hkv, T, D]; v [B, Hkv, T, Dv] -> [B, H, S, Dv]; query head u
    reads kv head u // (H / Hkv). `softcap` bounds scores by c tanh(s / c); `sinks` [H] join the
    softmax and carry no value. A query that sees no key gives zero.
    """
    out = _attention(q, *args, **kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? mask, Tensor? sinks, "
    "float scale, bool causal, int? window, float? softcap) -> Tensor",
    attention_reference,
    _attention_fake,
)
