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
# the largest channels of a token fall is worth a quarter of the error, and costs nothing to hold.
_WITHIN_A_DOUBLING = 2 ** (torch.arange(8, dtype=torch.float64) / 8)
# All scales are tried at once, for some tokens at a time: a long prompt would be held eight times.
_SLAB_ELEMENTS = 1 << 14


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
    step = _step(reach, scale.dtype)
    if form.kind == "floating":
        step = _nearest_step(wide, reach, form, scale.dtype)
    codes = _token_codes(wide, step.to(wide.dtype), form)
    # A float64 twin holds the same numbers in a wider type.
    return torch.cat([values, codes.to(values.dtype)], 2), torch.cat([scale, step], 2)


def _token_codes(x: Tensor, step: Tensor, form: NumberFormat) -> Tensor:
    q = x / step
    q = q.round() if form.kind == "integer" else q
    return q.clamp(-form.high, form.high).to(form.storage)


def _as_float(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for; of a token with a NaN, the scale is NaN and says so.

    torch casts float8 one by one on a CPU, at a tenth of this speed: the bits of an e4m3 are those
    of a half whose exponent is 8 lower, subnormal numbers included.
    """
    if codes.dtype != torch.float8_e4m3fn or not codes.is_cpu:
        return codes.to(dtype)
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    half.bitwise_and_(-0x4001)  # the sign was extended over the highest bit of the exponent
    return half.view(torch.float16).to(dtype).mul_(256)


def _nearest_step(x: Tensor, reach: Tensor, form: NumberFormat, dtype: torch.dtype) -> Tensor:
    """Of the scales within a doubling, that of the least squared error of each token."""
    tokens = max(1, _SLAB_ELEMENTS // max(1, x.shape[0] * x.shape[1] * x.shape[3]))
    chosen: list[Tensor] = []
    for part, start in zip(x.split(tokens, 2), reach.split(tokens, 2), strict=True):
        steps = _step(start * _WITHIN_A_DOUBLING.to(start), dtype)
        tried, numbers = steps.to(x.dtype).unsqueeze(-1), part.unsqueeze(-2)
        rounded = _as_float(_token_codes(numbers, tried, form), x.dtype) * tried
        error = (numbers - rounded).square().sum(-1)
        chosen.append(steps.take_along_dim(error.argmin(-1, keepdim=True), -1))
    return torch.cat(chosen, 2)


def read_token_reference(values: Tensor, scale: Tensor, new: Tensor) -> Tensor:
    """What attention reads: q s for the old tokens, then the new ones as they are.

    Shapes: values [B, H, T, D]; scale [B, H, T, 1]; new [B, H, S, D] -> [B, H, T + S, D].
    """
    wide = _compute_dtype(new)
    return torch.cat([(_as_float(values, wide) * scale.to(wide)).to(new.dtype), new], 2)


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
