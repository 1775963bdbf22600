"""fxopt::cache_append_* and cache_read_*: keys and values that are held in few bits between calls.

A state is what a decoder keeps of its keys, or of its values, in one layer. `append` quantizes new
tokens once and adds them; `read` gives what attention reads: the old tokens dequantized, then the
new ones as they are. Either the state holds every token by itself, or whole blocks of tokens and a
residual of the newest ones in floating point.
"""

import torch
from torch import Tensor

from fxopt.ir.number_formats import FORMATS, NumberFormat
from fxopt.ir.operators.packing import pack_codes, unpack_codes
from fxopt.ir.operators.registration import define

# How a token's numbers are held, by what a recipe calls it; folders of before say "fp8".
TOKEN_FORMATS = {name: FORMATS[name] for name in ("int8", "fp8_e4m3")}
TOKEN_FORMATS["fp8"] = FORMATS["fp8_e4m3"]

# The points of a floating format repeat at every doubling of the scale. Where between two of them
# the largest channels of a token fall is worth a fifth of the error, and costs nothing to hold.
_WITHIN_A_DOUBLING = [2 ** (step / 8) for step in range(1, 8)]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype of perhaps less reach, without becoming infinite."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _step(reach: Tensor, dtype: torch.dtype) -> Tensor:
    # A constant group has no reach; with the smallest normal number it stays exact and finite.
    return _held(reach, dtype).clamp(min=torch.finfo(dtype).tiny)


# --- every token by itself ------------------------------------------------------------------


def append_token_reference(
    values: Tensor, scale: Tensor, new: Tensor, dtype: str
) -> tuple[Tensor, Tensor]:
    """Quantize each new token of each head by itself and append it.

        int8   s = max |x| / q_max,                 q = round(x / s)
        fp8    s = 2^(k/8) max |x| / q_max,         q = cast(x / s),    k = argmin |x - s q|^2

    Shapes: values [B, H, T, D] int8 or float8; scale [B, H, T, 1]; new [B, H, S, D]
        -> [B, H, T + S, D], [B, H, T + S, 1].
    """
    form = TOKEN_FORMATS[dtype]
    wide = new.to(_compute_dtype(new))
    reach = wide.abs().amax(-1, keepdim=True) / float(form.high)
    step, q = _round_token(wide, reach, form, scale.dtype)
    if form.kind == "floating":
        least = _squared_error(wide, step, q)
        for stretch in _WITHIN_A_DOUBLING:
            other, codes = _round_token(wide, reach * stretch, form, scale.dtype)
            error = _squared_error(wide, other, codes)
            better = error < least
            step, q = torch.where(better, other, step), torch.where(better, codes, q)
            least = torch.minimum(least, error)
    # A float64 twin holds the same numbers in a wider type.
    return torch.cat([values, q.to(values.dtype)], 2), torch.cat([scale, step], 2)


def _round_token(
    x: Tensor, reach: Tensor, form: NumberFormat, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and the numbers of the format, still in the dtype of `x`."""
    step = _step(reach, dtype)
    q = x / step.to(x.dtype)
    q = q.round() if form.kind == "integer" else q
    return step, q.clamp(-form.high, form.high).to(form.storage).to(x.dtype)


def _squared_error(x: Tensor, step: Tensor, q: Tensor) -> Tensor:
    return (x - q * step.to(x.dtype)).square().sum(-1, keepdim=True)


def read_token_reference(values: Tensor, scale: Tensor, new: Tensor) -> Tensor:
    """What attention reads: q s for the old tokens, then the new ones as they are.

    Shapes: values [B, H, T, D]; scale [B, H, T, 1]; new [B, H, S, D] -> [B, H, T + S, D].
    """
    wide = _compute_dtype(new)
    return torch.cat([(values.to(wide) * scale.to(wide)).to(new.dtype), new], 2)


def _append_token_fake(
    values: Tensor, scale: Tensor, new: Tensor, dtype: str
) -> tuple[Tensor, Tensor]:
    del dtype
    batch, heads, length, width = values.shape
    total = length + new.shape[2]
    return values.new_empty(batch, heads, total, width), scale.new_empty(batch, heads, total, 1)


def _read_token_fake(values: Tensor, scale: Tensor, new: Tensor) -> Tensor:
    del scale
    batch, heads, length, width = new.shape
    return new.new_empty(batch, heads, values.shape[2] + length, width)


define(
    "cache_append_token(Tensor values, Tensor scale, Tensor new, str dtype) -> (Tensor, Tensor)",
    append_token_reference,
    _append_token_fake,
)
define(
    "cache_read_token(Tensor values, Tensor scale, Tensor new) -> Tensor",
    read_token_reference,
    _read_token_fake,
)


# --- blocks of tokens, and the newest in floating point -------------------------------------


def quantize_block(
    block: Tensor, bits: int, group: int, per_channel: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize whole blocks of W tokens in asymmetric groups of G.

        s = (max - min) / (2^b - 1),    q = clamp(round((x - min) / s), 0, 2^b - 1)

    Shapes: block [B, H, N, W, D] -> packed [B, H, N, W, D b / 8] and two of `dtype`, s and min:
        [B, H, N, W / G, D] per channel (groups of consecutive tokens), else [B, H, N, W, D / G]
        (groups of consecutive channels of a token).
    Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024,
        arXiv:2402.02750.
    """
    axis = 3 if per_channel else 4
    wide = block.to(_compute_dtype(block)).unflatten(axis, (-1, group))
    # Of an empty tensor there is no smallest number along an axis, but along a group there is.
    minimum = _held(wide.amin(axis + 1), dtype)
    start = minimum.to(wide.dtype)
    levels = (1 << bits) - 1
    scale = _step((wide.amax(axis + 1) - start) / levels, dtype)
    q = (wide - start.unsqueeze(axis + 1)) / scale.to(wide.dtype).unsqueeze(axis + 1)
    q = q.round().clamp(0, levels).flatten(axis, axis + 1)
    return pack_codes(q, bits), scale, minimum


def dequantize_block(
    packed: Tensor, scale: Tensor, minimum: Tensor, bits: int, per_channel: bool, dtype: torch.dtype
) -> Tensor:
    """The inverse of `quantize_block` up to half a step: x = q s + min."""
    axis = 3 if per_channel else 4
    q = unpack_codes(packed, bits, packed.shape[-1] * 8 // bits).to(
        torch.promote_types(dtype, torch.float32)
    )
    q = q.unflatten(axis, (scale.shape[axis], -1))
    dense = q * scale.to(q.dtype).unsqueeze(axis + 1) + minimum.to(q.dtype).unsqueeze(axis + 1)
    return dense.flatten(axis, axis + 1).to(dtype)


def append_group_reference(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    residual: Tensor,
    new: Tensor,
    bits: int,
    group: int,
    per_channel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append new tokens to the residual; whole blocks of W tokens leave it, quantized once.

    Shapes: packed [B, H, N, W, D b / 8] uint8; scale and minimum as in `quantize_block`; residual
        [B, H, r, D], r < W; new [B, H, S, D] -> the same with n = (r + S) // W more blocks and
        a residual of (r + S) % W tokens.
    """
    window = packed.shape[3]
    tail = torch.cat([residual, new], 2)
    full = tail.shape[2] // window
    if full == 0:
        return packed.clone(), scale.clone(), minimum.clone(), tail
    block = tail[:, :, : full * window].unflatten(2, (full, window))
    made = quantize_block(block, bits, group, per_channel, scale.dtype)
    old = (packed, scale, minimum)
    first, second, third = (torch.cat(pair, 2) for pair in zip(old, made, strict=True))
    # A copy: a view would keep the whole of the tokens before it alive.
    return first, second, third, tail[:, :, full * window :].clone()


def read_group_reference(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    residual: Tensor,
    new: Tensor,
    bits: int,
    per_channel: bool,
) -> Tensor:
    """What attention reads: the blocks dequantized, the residual, then the new tokens.

    Shapes: as in `append_group_reference` -> [B, H, N W + r + S, D].
    """
    dense = dequantize_block(packed, scale, minimum, bits, per_channel, new.dtype)
    return torch.cat([dense.flatten(2, 3), residual, new], 2)


def _append_group_fake(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    residual: Tensor,
    new: Tensor,
    bits: int,
    group: int,
    per_channel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del bits, group, per_channel
    window = packed.shape[3]
    tail = residual.shape[2] + new.shape[2]

    def longer(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:2], x.shape[2] + tail // window, *x.shape[3:])

    batch, heads, _, width = new.shape
    left = residual.new_empty(batch, heads, tail % window, width)
    return longer(packed), longer(scale), longer(minimum), left


def _read_group_fake(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    residual: Tensor,
    new: Tensor,
    bits: int,
    per_channel: bool,
) -> Tensor:
    del scale, minimum, bits, per_channel
    batch, heads, length, width = new.shape
    total = packed.shape[2] * packed.shape[3] + residual.shape[2] + length
    return new.new_empty(batch, heads, total, width)


_STATE = "Tensor packed, Tensor scale, Tensor minimum, Tensor residual, Tensor new, int bits, "
define(
    f"cache_append_group({_STATE}int group, bool per_channel) -> (Tensor, Tensor, Tensor, Tensor)",
    append_group_reference,
    _append_group_fake,
)
define(
    f"cache_read_group({_STATE}bool per_channel) -> Tensor",
    read_group_reference,
    _read_group_fake,
)
