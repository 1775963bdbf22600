"""A batch of calibration data, and which rows of a program's activations are of real tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.ir.program import Program, hints, shape_of

_READ_BY_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Sample:
    """Flat inputs of one calibration batch, and which of its tokens are real.

    Attributes:
        inputs: as the program takes them.
        tokens: bool [B, S]; None when all are real.
        decoder_tokens: the same of what a decoder reads beside an encoder.
    """

    inputs: Sequence[Tensor]
    tokens: Tensor | None = None
    decoder_tokens: Tensor | None = None

    def real(self, of_decoder: bool) -> Tensor | None:
        """Which tokens are real, of the decoder or of all that comes before it."""
        return self.decoder_tokens if of_decoder else self.tokens

    @property
    def count(self) -> int:
        """How many real tokens there are, as far as it can be told."""
        if self.tokens is not None:
            return int(self.tokens.sum())
        return max((value.shape[0] for value in self.inputs if value.dim()), default=0)


class RealTokens:
    """Which of a decoder's and an encoder's tokens an activation of a program holds.

    Sizes that may differ differed at capture, so an activation whose token axis was as long as the
    decoder's input was is the decoder's, however long the two are in the data.
    """

    def __init__(self, program: Program) -> None:
        self._decoder: list[list[int]] = []
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.target in _READ_BY_DECODER:
                batch, length = hints(shape_of(node))[:2]
                if batch is not None and length is not None:
                    # A model may flatten its tokens.
                    self._decoder += [[batch, length], [batch * length]]

    def rows(self, node: Node, value: Tensor, sample: Sample) -> Tensor:
        """What a node gives for a sample as rows [tokens, channels], padding left out.

        Heads [B, H, S, h] that no linear reads are taken as channels [B, S, H h].
        """
        if _is_by_head(node):
            masks = [m for m in (sample.tokens, sample.decoder_tokens) if m is not None]
            fitting = [m for m in masks if m.shape == (value.shape[0], value.shape[2])]
            return real_rows(value.transpose(1, 2).flatten(2), fitting[0] if fitting else None)
        return real_rows(value, sample.real(self.of_decoder(node)))

    def of_decoder(self, node: Node) -> bool:
        """Whether a node's tokens are those that a decoder reads beside an encoder."""
        shape = hints(shape_of(node))[:-1]
        return any(shape[: len(leading)] == leading for leading in self._decoder)


def _is_by_head(node: Node) -> bool:
    """Whether an activation is [B, H, S, h]: of its inner axes the number of tokens may vary."""
    shape = shape_of(node)
    if len(shape) != 4 or type(shape[1]) is not int or type(shape[2]) is int:
        return False
    return not any(
        user.target is torch.ops.aten.linear.default and user.args[0] is node for user in node.users
    )


def real_rows(value: Tensor, tokens: Tensor | None) -> Tensor:
    """An activation as rows [tokens, channels], padding left out where it can be told."""
    if value.dim() < 2:
        return value.reshape(1, -1)
    # A pooled activation [B, d] has no token axis, even where d happens to be the length.
    if tokens is not None and value.dim() >= 3 and value.shape[:2] == tokens.shape:
        value = value[tokens]
    elif tokens is not None and value.dim() == 2 and len(value) == tokens.numel():
        value = value[tokens.flatten()]  # [B S, d]: a model may flatten its tokens
    return value.reshape(-1, value.shape[-1])
