"""The `fxopt::` operators that a captured or quantized program is written in.

Each is a `torch.library` operator with a plain torch reference, which runs on every device, and
a fake implementation, so that a program can be exported and compiled at every level. Operators
that only lowering writes live in `fxopt.kernels`.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError

LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "identity")


def _define(schema: str, reference: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)


# --- attention ------------------------------------------------------------------------------


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


def merge_masks(structured: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
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
        torch._check(padding.shape[0] == q.shape[0])
        torch._check(padding.shape[1] == k.shape[2])
    # SDPA gives [B, S, H, D] memory seen as [B, H, S, D]; the layout is part of the contract.
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


def _attention_strided(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = _attention(q, *args, **kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? mask, Tensor? sinks, "
    "float scale, bool causal, int? window, float? softcap) -> Tensor",
    _attention_strided,
    _attention_fake,
)


# --- rotary embedding -----------------------------------------------------------------------


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        pairs = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        half = rotary // 2
        pairs = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    turned = turned * cos + pairs * sin
    return torch.cat((turned, rest.to(turned.dtype)), -1) if rest.shape[-1] else turned


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    del sin, interleaved
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


_define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    lambda *args: _rope(*args).contiguous(),
    _rope_fake,
)


# --- mixture of experts ---------------------------------------------------------------------


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


_define(
    "moe(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated) -> Tensor",
    _moe,
    _moe_fake,
)


# --- quantization ---------------------------------------------------------------------------
# A block is the part of a tensor that shares one scale. Block shapes cover every granularity:
# the whole tensor, one channel (1, K), a group (1, g), one token (1, ..., 1, K).


def block_counts(shape: Any, block: Any) -> list[Any]:
    """How many blocks lie along each axis; -1 in a block means the whole axis."""
    return [1 if size == -1 else length // size for length, size in zip(shape, block, strict=True)]


def _check_blocks(x: Tensor, block: Any) -> None:
    if len(block) != x.dim():
        raise KernelError(
            f"block {list(block)} has {len(block)} axes, the tensor {list(x.shape)} has {x.dim()}."
        )
    for length, size in zip(x.shape, block, strict=True):
        if size != -1 and length % size:
            raise KernelError(
                f"block {list(block)} does not divide the tensor {list(x.shape)}; choose a group "
                f"size that divides {length}."
            )


def _blocked(x: Tensor, block: Any) -> tuple[Tensor, list[int]]:
    shape: list[int] = []
    for count, length in zip(block_counts(x.shape, block), x.shape, strict=True):
        shape += [count, length // max(count, 1)]
    return x.reshape(shape), list(range(1, 2 * x.dim(), 2))


def _spread(parameter: Tensor, x: Tensor, block: Any) -> Tensor:
    """Repeat a per-block parameter so that it broadcasts against the blocked view of `x`."""
    counts = block_counts(x.shape, block)
    return parameter.reshape([size for count in counts for size in (count, 1)])


def _choose_qparams(
    x: Tensor, block: Any, symmetric: bool, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    _check_blocks(x, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    blocked, axes = _blocked(x.detach().to(compute), block)
    counts = block_counts(x.shape, block)
    if symmetric:
        reach = blocked.abs().amax(axes)
        scale = reach / ((quant_max - quant_min) / 2)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        low = blocked.amin(axes).clamp(max=0)
        high = blocked.amax(axes).clamp(min=0)
        scale = (high - low) / (quant_max - quant_min)
        safe = torch.where(scale > 0, scale, 1)
        zero_point = (quant_min - torch.round(low / safe)).to(torch.int32)
    # A block of zeros has scale 0; the smallest normal number keeps it exact and finite.
    scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    return scale.reshape(counts), zero_point.reshape(counts)


def _choose_qparams_fake(x: Tensor, block: Any, *_: Any) -> tuple[Tensor, Tensor]:
    counts = block_counts(x.shape, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(counts, dtype=compute), x.new_empty(counts, dtype=torch.int32)


_define(
    "choose_qparams(Tensor x, SymInt[] block, bool symmetric, int quant_min, int quant_max) "
    "-> (Tensor, Tensor)",
    _choose_qparams,
    _choose_qparams_fake,
)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Any,
    dtype: torch.dtype,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    _check_blocks(x, block)
    blocked, _ = _blocked(x.to(scale.dtype), block)
    q = torch.round(blocked / _spread(scale, x, block))
    if zero_point is not None:
        q = q + _spread(zero_point, x, block)
    return q.clamp(quant_min, quant_max).to(dtype).reshape(x.shape)


_define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, ScalarType dtype, "
    "int quant_min, int quant_max) -> Tensor",
    _quantize,
    lambda x, scale, zero_point, block, dtype, *_: x.new_empty(x.shape, dtype=dtype),
)


def _dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Any, dtype: torch.dtype
) -> Tensor:
    blocked, _ = _blocked(q, block)
    centred = blocked.to(scale.dtype)
    if zero_point is not None:
        centred = centred - _spread(zero_point, q, block)
    return (centred * _spread(scale, q, block)).to(dtype).reshape(q.shape)


_define(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, SymInt[] block, ScalarType dtype) "
    "-> Tensor",
    _dequantize,
    lambda q, scale, zero_point, block, dtype: q.new_empty(q.shape, dtype=dtype),
)
