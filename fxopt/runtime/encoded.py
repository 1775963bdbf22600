"""What an encoder-decoder computes once per text, and whether it is still what was computed.

The decoder's cross-attention keys are computed with the encoder, so what a caller changes of the
hidden state, or of the mask, afterwards would reach nobody: it is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fxopt.errors import InputError
from fxopt.runtime.stages import Stages

_AS_ENCODED = "as_encoded"


@dataclass
class EncodedSource(ModelOutput):
    """What the first stage returns; passed back as `encoder_outputs`.

    The entries have a row per text and are repeated for beams, those that are added by item too:
    `carried_<i>`, and under `as_encoded` what must not change. `shared` holds the tensors that all
    rows share.
    """

    last_hidden_state: Tensor | None = None
    shared: tuple[Tensor, ...] | None = None


def pack_source(
    stages: Stages, values: Sequence[Tensor], masks: Mapping[str, Tensor]
) -> EncodedSource:
    """The carried tensors, with the masks and the hidden state that they were computed from."""
    hidden = values[stages.hidden]
    source = EncodedSource(last_hidden_state=hidden)
    for index, value in enumerate(values):
        if stages.expands[index] and index != stages.hidden:
            source[f"carried_{index}"] = value
    shared = tuple(v for v, expands in zip(values, stages.expands, strict=True) if not expands)
    if shared:
        source["shared"] = shared
    # A copy, because the caller may write into the state itself.
    source[_AS_ENCODED] = hidden.clone()
    for name, mask in masks.items():
        source[f"{_AS_ENCODED}_{name}"] = mask
    return source


def unpack_source(stages: Stages, source: Any, given: Mapping[str, Any]) -> list[Tensor]:
    """The carried tensors, in order.

    Raises:
        InputError: `source` is not what `pack_source` returned, or its hidden state or one of the
            masks in `given` is another than that it was computed from.
    """
    if not isinstance(source, EncodedSource) or _AS_ENCODED not in source:
        raise InputError(
            f"encoder_outputs is a {type(source).__name__}; pass what model.get_encoder() "
            "returns, which holds the decoder's cross-attention keys as well."
        )
    if not _same(source.last_hidden_state, source[_AS_ENCODED]):
        raise InputError(
            "encoder_outputs.last_hidden_state is not what the encoder returned. The decoder's "
            "cross-attention keys were computed from that and do not follow the change; run "
            "model.get_encoder() on the inputs that are meant."
        )
    for name, value in given.items():
        known = source.get(f"{_AS_ENCODED}_{name}")
        if known is not None and not _same(value, known):
            raise InputError(
                f"{name} is not the one that encoder_outputs were computed with, and would have no "
                f"effect. Run model.get_encoder() with this {name}, or leave it out beside "
                "encoder_outputs."
            )
    shared = iter(source.shared or ())
    carried: list[Tensor] = []
    for index, expands in enumerate(stages.expands):
        name = "last_hidden_state" if index == stages.hidden else f"carried_{index}"
        carried.append(source[name] if expands else next(shared))
    return carried


def _same(value: Any, known: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dtype != known.dtype or value.shape != known.shape:
        return False
    # A state may hold NaN, which equals nothing; that takes a second look only where it does.
    return torch.equal(value, known) or torch.allclose(value, known, 0, 0, equal_nan=True)
