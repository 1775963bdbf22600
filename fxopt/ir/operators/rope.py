"""fxopt::rope: rotary position embedding."""

import torch
from torch import Tensor

from fxopt.ir.operators.registration import define


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


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate: x cos + turn(x) sin on the first R channels; the rest passes through.

    Shapes: x [..., D]; cos and sin broadcastable to [..., R], R <= D. `turn` is (-x2, x1) on
    halves, or on neighbouring pairs when interleaved.
    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
        arXiv:2104.09864.
    """
    return _rope(x, cos, sin, interleaved).contiguous()


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    del sin, interleaved
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    rope_reference,
    _rope_fake,
)
