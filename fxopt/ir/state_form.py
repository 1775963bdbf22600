"""How a decoder's keys or values are held between calls: dense, per token, or in groups."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InputError, LoadError
from fxopt.ir.operators.cache import TOKEN_FORMATS

_BITS = {"int4": 4, "int2": 2}
_DTYPES = ("", *TOKEN_FORMATS, *_BITS)


@dataclass(frozen=True)
class StateForm:
    """The tensors that hold the keys, or the values, of one layer; batch first, then heads.

    dtype        tensors
    "" (dense)   [B, H, T, D]
    int8, fp8_*  values [B, H, T, D], scale [B, H, T, 1]
    int4, int2   packed [B, H, N, W, D b / 8], scale and minimum [B, H, N, W / G, D] per channel or
                 [B, H, N, W, D / G] per token, residual [B, H, r, D] with r < W

    Attributes:
        dtype: what holds a number; "" is the program's own floating dtype.
        group: G, how many numbers share a scale; 0 where a token does.
        window: W, tokens of a block; 0 where there are no blocks.
        per_channel: groups are consecutive tokens of a channel, not channels of a token.
    """

    dtype: str = ""
    group: int = 0
    window: int = 0
    per_channel: bool = False

    @property
    def bits(self) -> int:
        """Bits of a packed number; 0 where nothing is packed."""
        return _BITS.get(self.dtype, 0)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the tensors are called, in order."""
        if self.bits:
            return ("packed", "scale", "minimum", "residual")
        return ("values", "scale") if self.dtype else ("",)

    @property
    def tokens(self) -> tuple[int, ...]:
        """For each tensor, how many tokens an entry along axis 2 stands for; 0 beside others."""
        if self.bits:
            return (self.window, 0, 0, 1)
        return (1, 0) if self.dtype else (1,)

    @property
    def dense_part(self) -> int:
        """Which tensor has the heads and channels of a dense one."""
        return 3 if self.bits else 0

    def length(self, state: Sequence[Tensor]) -> int:
        """How many tokens a state holds."""
        return sum(
            tensor.shape[2] * tokens
            for tensor, tokens in zip(state, self.tokens, strict=True)
            if tokens
        )

    def append(self, state: Sequence[Tensor], new: Tensor) -> list[Tensor]:
        """The state after more tokens [B, H, S, D]."""
        ops = torch.ops.fxopt
        if self.bits:
            options = (self.bits, self.group, self.per_channel)
            return list(ops.cache_append_group(*state, new, *options))
        if self.dtype:
            return list(ops.cache_append_token(*state, new, self.dtype))
        return [torch.cat([state[0], new], 2)]

    def first(self, state: Sequence[Tensor], length: int) -> list[Tensor]:
        """The state as it was when it held only its first `length` tokens.

        Raises:
            InputError: it would have to cut a block that is quantized already.
        """
        held = self.length(state)
        if not self.bits:
            return [tensor[:, :, :length].clone() for tensor in state]
        kept = length - (held - state[3].shape[2])
        if kept < 0:
            raise InputError(
                f"the cache was asked to go back from {held} tokens to {length}; in {self.dtype} "
                f"only the newest {state[3].shape[2]} are in floating point, and blocks of "
                f"{self.window} quantized tokens are not taken apart. Start from an empty cache, "
                "or use an int8 cache where tokens must be taken back."
            )
        return [*state[:3], state[3][:, :, :kept].clone()]

    def describe(self) -> str:
        """In words, for messages and reports."""
        if self.bits:
            along = "tokens of a channel" if self.per_channel else "channels of a token"
            return f"{self.dtype}, {self.group} {along} a group, blocks of {self.window} tokens"
        return f"{self.dtype} per token and head" if self.dtype else "floating point"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the stored folder."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "StateForm":
        """The inverse of `to_dict`.

        Raises:
            LoadError: no cache is held like that.
        """
        form = StateForm(**data)
        plain = type(form.group) is int and type(form.window) is int
        if form.dtype not in _DTYPES or not plain or type(form.per_channel) is not bool:
            raise LoadError(
                f"there is no cache of the form {str(data)[:80]}; the folder is damaged."
            )
        if form.bits and not (form.group > 0 and form.window > 0):
            raise LoadError("a cache in groups has no group or window; the folder is damaged.")
        return form


DENSE = StateForm()
