"""The parts of random transformers: norms, rope, attention, feed-forward, mixtures of experts."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.random_choices import Choice

EPSILON = 1e-5
SOFTCAP = 5.0
ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "squared_relu": lambda x: functional.relu(x).square(),
    "identity": lambda x: x,
}


class Norm(nn.Module):
    """A layer norm, an rms norm with gain w or 1 + w, or nothing."""

    def __init__(self, kind: str, width: int, choice: Choice) -> None:
        super().__init__()
        self.kind, self.width, self.written_out = kind, width, choice.norm_written_out
        if kind != "none":
            self.gain = nn.Parameter(torch.empty(width))
        biased = kind == "layer_norm" and choice.norm_bias
        self.bias = nn.Parameter(torch.empty(width)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if not self.written_out:
            if self.kind == "layer_norm":
                return functional.layer_norm(x, (self.width,), self.gain, self.bias, EPSILON)
            return functional.rms_norm(x, (self.width,), self.gain, EPSILON)
        if self.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
        x = x * (1 + self.gain if self.kind == "offset_rms_norm" else self.gain)
        return x if self.bias is None else x + self.bias


def rope(x: Tensor, choice: Choice) -> Tensor:
    """Turn the first channels of each head by the position: x [B, H, S, h]."""
    rotary, interleaved = choice.rotary, choice.rope == "interleaved"
    frequency = 100.0 ** (-torch.arange(0, rotary, 2, dtype=x.dtype) / rotary)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    part, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    part = part * angle.cos() + turned * angle.sin()
    return torch.cat((part, rest), -1) if rotary < choice.head_width else part


class Projections(nn.Module):
    """x [B, S, d] to q [B, S, H, h], k and v [B, T, G, h], and the output's gate or None."""

    def __init__(self, choice: Choice, form: str) -> None:
        super().__init__()
        self.form = form
        self.heads, self.groups, self.head = choice.heads, choice.groups, choice.head_width
        query, key = self.heads * self.head, self.groups * self.head
        bias = choice.attention_bias
        if form in ("fused", "fused_per_head"):
            self.qkv = nn.Linear(choice.width, query + 2 * key, bias)
        else:
            self.q = nn.Linear(choice.width, query * (2 if form == "query_gate" else 1), bias)
            self.k, self.v = (nn.Linear(choice.width, key, bias) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        heads, groups, head = self.heads, self.groups, self.head
        gate = None
        if self.form == "fused":  # all queries, all keys, all values
            q, k, v = self.qkv(x).split((heads * head, groups * head, groups * head), -1)
        elif self.form == "fused_per_head":  # the queries of a kv head, its key, its value
            share = heads // groups
            packed = self.qkv(x).unflatten(-1, (groups, share + 2, head))
            q, k, v = packed.split((share, 1, 1), -2)
            q, k, v = q.flatten(-3), k.flatten(-3), v.flatten(-3)
        else:
            q, k, v = self.q(x), self.k(memory), self.v(memory)
        if self.form == "query_gate":  # per head: the query, then its gate
            q, gate = q.unflatten(-1, (heads, 2 * head)).chunk(2, -1)
            gate = gate.flatten(-2)
        return (
            q.reshape(*x.shape[:2], heads, head),
            k.reshape(*memory.shape[:2], groups, head),
            v.reshape(*memory.shape[:2], groups, head),
            gate,
        )


class QueryKeyNorm(nn.Module):
    """A norm of each head of [B, S, H, h], or of all heads at once."""

    def __init__(self, choice: Choice, heads: int) -> None:
        super().__init__()
        self.whole = choice.qk_norm == "projection"
        # A model without norms elsewhere may still have these, as an rms norm.
        kind = choice.norm if choice.qk_norm != "none" and choice.norm != "none" else "rms_norm"
        width = choice.head_width * (heads if self.whole else 1)
        self.norm = Norm("none" if choice.qk_norm == "none" else kind, width, choice)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(-2)).view(x.shape) if self.whole else self.norm(x)


class Attention(nn.Module):
    """Self attention, or attention to a second input without rope and without a mask."""

    def __init__(self, choice: Choice, cross: bool = False) -> None:
        super().__init__()
        self.choice, self.cross = choice, cross
        # Queries and keys of different inputs cannot come out of one projection.
        fused = choice.projections in ("fused", "fused_per_head")
        form = "separate" if cross and fused else choice.projections
        self.project = Projections(choice, form)
        self.q_norm = QueryKeyNorm(choice, choice.heads)
        self.k_norm = QueryKeyNorm(choice, choice.groups)
        width = choice.heads * choice.head_width
        self.out = nn.Linear(width, choice.width, choice.attention_bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v, gate = self.project(x, memory)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        v = v.transpose(1, 2)
        if self.choice.rope != "none" and not self.cross:
            q, k = rope(q, self.choice), rope(k, self.choice)
        attend = self._sdpa if self.choice.attention_form == "sdpa" else self._softmax
        result = attend(q, k, v).transpose(1, 2).flatten(-2)
        return self.out(result if gate is None else result * torch.sigmoid(gate))

    def _mask(self, x: Tensor) -> Tensor | None:
        causal, window = self.choice.causal, self.choice.window
        if self.cross or not (causal or window):
            return None
        position = torch.arange(x.shape[2])
        distance = position[:, None] - position[None, :]
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible = visible & (distance.abs() < window)
        if self.choice.mask_form == "boolean":
            return visible
        return torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -torch.inf)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.choice.groups != self.choice.heads
        if self.choice.causal and self.choice.window is None and not self.cross:
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )
        mask = self._mask(q)
        return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = self.choice.heads // self.choice.groups
        if share > 1:
            k, v = (
                t[:, :, None].expand(-1, -1, share, -1, -1).reshape(t.shape[0], -1, *t.shape[2:])
                for t in (k, v)
            )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.choice.head_width)
        if self.choice.score_softcap:
            scores = torch.tanh(scores / SOFTCAP) * SOFTCAP
        mask = self._mask(q)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        return torch.matmul(torch.softmax(scores, -1), v)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) with gate and up apart or in one."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.gated, self.fused = choice.gated, choice.fused_gate_up
        self.activation = ACTIVATIONS[choice.activation.removeprefix("gated_")]
        width, hidden, bias = choice.width, choice.hidden, choice.feed_forward_bias
        self.up = nn.Linear(width, hidden * (2 if self.fused else 1), bias)
        if self.gated and not self.fused:
            self.gate = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if not self.gated:
            return self.down(self.activation(up))
        gate, up = up.chunk(2, -1) if self.fused else (self.gate(x), up)
        return self.down(self.activation(gate) * up)


class Experts(nn.Module):
    """Every expert on every token, weighted by a softmax router: no flow that depends on data."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.router = nn.Linear(choice.width, choice.experts, choice.feed_forward_bias)
        self.experts = nn.ModuleList(FeedForward(choice) for _ in range(choice.experts))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.softmax(self.router(x), -1)
        total = weight[..., :1] * self.experts[0](x)
        for index, expert in enumerate(self.experts[1:], 1):
            total = total + weight[..., index : index + 1] * expert(x)
        return total
