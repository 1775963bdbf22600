"""Key/value caches of decoders, as flat tensors at the edge of a graph."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.utils import ModelOutput

from fxopt.errors import CaptureError
from fxopt.ir.cache_names import CACHE_NAMES


class CaptureLayer(DynamicLayer):
    """A cache layer whose length may be symbolic, zero included."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        if keys is not None and values is not None:
            self.keys, self.values = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append along the length; the first update of an empty layer adds nothing to the graph."""
        del args, kwargs
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=-2)  # type: ignore[list-item]
            value_states = torch.cat([self.values, value_states], dim=-2)  # type: ignore[list-item]
        else:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """The length of the keys, without asking whether they are empty."""
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0


def cache_from_tensors(tensors: list[Tensor], encoder_decoder: bool) -> Cache:
    """A cache that holds `tensors` = [key0, value0, key1, value1, ...]."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = CaptureLayer
    layers: list[Any] = cache.layers
    layers[:] = [CaptureLayer(k, v) for k, v in zip(tensors[::2], tensors[1::2], strict=True)]
    if not encoder_decoder:
        return cache
    # The cross-attention side starts empty, so that its keys are computed inside the graph; the
    # runtime computes that part of the graph once per generated text.
    cross = DynamicCache()
    cross.layer_class_to_replicate = CaptureLayer
    return EncoderDecoderCache(cache, cross)


def cache_parameter(parameters: Collection[str]) -> str | None:
    """The parameter by which a model's forward takes a cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def returned_cache(output: Any) -> Cache | None:
    """The cache in a model's result."""
    found = (getattr(output, name, None) for name in CACHE_NAMES if not _is_old(output, name))
    return next((cache for cache in found if cache is not None), None)


def _is_old(output: Any, name: str) -> bool:
    # transformers keeps a former name as a property of every result, which warns when it is read.
    return isinstance(output, ModelOutput) and hasattr(ModelOutput, name)


def tensors_from_cache(cache: Any) -> list[Tensor]:
    """Keys and values of a cache in layer order.

    Raises:
        CaptureError: the cache holds states that are not keys and values.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    tensors: list[Tensor] = []
    for index, layer in enumerate(getattr(own, "layers", [])):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(layer, DynamicLayer) or keys is None or values is None:
            raise CaptureError(
                f"layer {index} of the model's cache is a {type(layer).__name__}, which does not "
                "hold keys and values (a recurrent or convolutional state, perhaps). The model "
                "can be captured without its cache: set config.use_cache to False."
            )
        tensors += [keys, values]
    return tensors
