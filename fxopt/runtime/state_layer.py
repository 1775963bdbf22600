"""One layer of an HF cache that holds keys and values in a program's own form."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fxopt.errors import InputError
from fxopt.ir.state_form import StateForm


class StateLayer(CacheLayerMixin):
    """Keys and values as a program returned them; only that program can read or extend them.

    Everything that `generate` does to a cache between two steps is done to each tensor: rows are
    chosen or repeated along the batch axis, which comes first in all of them.

    Attributes:
        forms: how the keys and how the values are held.
        states: the tensors of the keys and those of the values.
    """

    is_sliding = False

    def __init__(self, forms: tuple[StateForm, ...], states: list[list[Tensor]]) -> None:
        super().__init__()
        self.forms = forms
        self.states = states
        self.device = states[0][0].device
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens can be taken back, however many."""
        return not any(form.bits for form in self.forms)

    def __repr__(self) -> str:
        return f"StateLayer({self.forms[0].describe()} | {self.forms[1].describe()})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made by what a program returned."""
        del key_states, value_states

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refused: the program that made the layer extends it, in its graph.

        Raises:
            InputError: always.
        """
        del key_states, value_states, args, kwargs
        raise InputError(
            f"a model tried to append keys to a cache held as {self.forms[0].describe()}; only the "
            "optimized model that filled it can go on from it. Start from an empty cache."
        )

    def get_seq_length(self) -> int:
        """How many tokens are held, those in the residual included."""
        return self.forms[0].length(self.states[0]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next step will see, and at which position they begin."""
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before transformers 5.20."""
        return -1

    def reset(self) -> None:
        """Hold nothing: the next call starts anew."""
        self.states = [[tensor[:0] for tensor in state] for state in self.states]
        self.is_initialized = False

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to where they were made."""
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose the row of each beam."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda tensor: tensor[indices.to(tensor.device), ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens; a positive number says how many stay.

        Raises:
            InputError: tokens in a quantized block would have to go.
        """
        held = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else held + tokens_to_remove
        if kept >= held or not self.is_initialized:
            return
        pairs = zip(self.forms, self.states, strict=True)
        self.states = [form.first(state, max(kept, 0)) for form, state in pairs]

    def nbytes(self) -> int:
        """Bytes of the storages behind all tensors."""
        return sum(t.untyped_storage().nbytes() for state in self.states for t in state)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.states = [[change(tensor) for tensor in state] for state in self.states]
