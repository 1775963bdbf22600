"""Random transformers: plain modules with random weights, for tests of properties.

    model = build(choice, seed)
    outputs = model(*inputs(choice, seed, batch=2, length=5))

`choices()` is a strategy over all of them. Nothing in a model is the identity: gains lie between
0.5 and 1.5, biases are not zero, and so a pass that loses one is found out.
"""

import torch
from torch import Tensor, nn

from tests.random_blocks import SOFTCAP, Attention, Experts, FeedForward, Norm
from tests.random_choices import AXES, MAX_LENGTH, VOCABULARY, Choice, choices

__all__ = ["AXES", "Choice", "build", "choices", "inputs"]

MULTIPLIER = 0.7


class Branch(nn.Module):
    """What is added to the residual: norms around a block, a layer scale, a multiplier."""

    def __init__(self, choice: Choice, block: nn.Module, norm_before: bool = True) -> None:
        super().__init__()
        before = choice.norm if norm_before and choice.placement != "post" else "none"
        after = choice.norm if choice.placement == "sandwich" else "none"
        self.before, self.after = (Norm(kind, choice.width, choice) for kind in (before, after))
        self.block = block
        self.layer_scale = nn.Parameter(torch.empty(choice.width)) if choice.layer_scale else None
        self.multiplier = {
            "none": None,
            "float": MULTIPLIER,
            "parameter": nn.Parameter(torch.empty(())),
        }[choice.residual_multiplier]

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.before(x)
        if isinstance(self.block, Attention):
            y = self.block(x, x if memory is None else memory)
        else:
            y = self.block(x)
        y = self.after(y)
        y = y if self.layer_scale is None else y * self.layer_scale
        return y if self.multiplier is None else y * self.multiplier


class Layer(nn.Module):
    """Attention, attention to the second input, and feed-forward, one after another or at once."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.parallel, self.cross = choice.parallel, choice.cross_attention
        norm = choice.norm if choice.placement == "post" else "none"
        shared = choice.norm if self._one_norm(choice) else "none"
        self.shared_norm = Norm(shared, choice.width, choice)
        own = not self._one_norm(choice)
        self.attention = Branch(choice, Attention(choice), own)
        feed_forward = Experts(choice) if choice.experts else FeedForward(choice)
        self.feed_forward = Branch(choice, feed_forward, own)
        self.feed_forward_norm = Norm(norm, choice.width, choice)
        if self.parallel == "no":
            self.attention_norm = Norm(norm, choice.width, choice)
        if self.cross:
            self.cross_attention = Branch(choice, Attention(choice, cross=True))
            self.cross_norm = Norm(norm, choice.width, choice)

    @staticmethod
    def _one_norm(choice: Choice) -> bool:
        return choice.parallel == "one_norm" and choice.placement != "post"

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        if self.cross and memory is not None:
            x = self.cross_norm(x + self.cross_attention(x, memory))
        if self.parallel != "no":
            normed = self.shared_norm(x)
            x = x + self.attention(normed) + self.feed_forward(normed)
            return self.feed_forward_norm(x)
        x = self.attention_norm(x + self.attention(x))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Transformer(nn.Module):
    """Tokens [B, S] or vectors [B, S, d], and a memory [B, T, d], to logits or hidden states."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice
        if choice.tokens:
            self.embedding = nn.Embedding(VOCABULARY, choice.width)
        if choice.positions == "learned":
            self.positions = nn.Embedding(MAX_LENGTH, choice.width)
        elif choice.positions == "sinusoidal":
            self.register_buffer("table", sinusoids(choice.width))
        self.layers = nn.ModuleList(Layer(choice) for _ in range(choice.layers))
        final = "none" if choice.placement == "post" else choice.norm
        self.norm = Norm(final, choice.width, choice)
        if choice.unembedding != "none":
            self.unembedding = nn.Linear(choice.width, VOCABULARY, bias=False)
        if choice.unembedding == "tied":
            self.unembedding.weight = self.embedding.weight

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.embedding(x) if self.choice.tokens else x
        if self.choice.positions == "learned":
            x = x + self.positions(torch.arange(x.shape[1]))
        elif self.choice.positions == "sinusoidal":
            x = x + self.table[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, memory)
        x = self.norm(x)
        if self.choice.unembedding != "none":
            x = self.unembedding(x)
        return torch.tanh(x / SOFTCAP) * SOFTCAP if self.choice.logit_softcap else x


def sinusoids(width: int) -> Tensor:
    """The fixed position table [MAX_LENGTH, d]: sines, then cosines."""
    frequency = 100.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(MAX_LENGTH)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1)


def build(choice: Choice, seed: int) -> nn.Module:
    """A float32 model in eval mode; the same choice and seed give the same weights."""
    model = Transformer(choice).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter, choice, generator))
    return model.requires_grad_(False)


def _values(name: str, like: Tensor, choice: Choice, generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return torch.randn(like.shape, generator=generator) * 0.3
    if like.dim() == 2:  # rows of a table stand alone, projections add up `fan_in` terms
        fan_in = 1 if name.startswith(("embedding", "positions")) else like.shape[1]
        return torch.randn(like.shape, generator=generator) / fan_in**0.5
    gain = torch.rand(like.shape, generator=generator) + 0.5
    if choice.negative_gains:
        gain = torch.where(torch.rand(like.shape, generator=generator) < 0.3, -gain, gain)
    is_offset = leaf == "gain" and choice.norm == "offset_rms_norm"
    return gain - 1 if is_offset else gain


def inputs(choice: Choice, seed: int, batch: int, length: int) -> tuple[Tensor, ...]:
    """Token ids or float32 vectors, and for cross attention a memory of another length."""
    generator = torch.Generator().manual_seed(seed)
    if choice.tokens:
        x = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    else:
        x = torch.randn(batch, length, choice.width, generator=generator)
    if not choice.cross_attention:
        return (x,)
    return x, torch.randn(batch, length + 2, choice.width, generator=generator)
