"""The key/value cache at run time: an HF cache whose layers hold what the graph returned."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from fxopt.errors import InputError
from fxopt.ir.signature import Signature


def new_cache(encoder_decoder: bool) -> Cache:
    """An empty cache that the program can read and fill."""
    cache = DynamicCache()
    return EncoderDecoderCache(cache, DynamicCache()) if encoder_decoder else cache


def read_cache(
    signature: Signature, cache: Cache | None, batch: int, device: torch.device
) -> list[Tensor]:
    """The graph's past inputs out of a cache; tensors of length zero where it is empty.

    Raises:
        InputError: the cache is of a kind, or holds layers, that the program cannot continue.
    """
    assert signature.cache is not None  # noqa: S101 - callers ask only programs with a cache
    count = 2 * signature.cache.layers
    specs = signature.inputs[-count:]
    layers = _layers(cache)
    tensors: list[Tensor] = []
    for index, spec in enumerate(specs):
        layer = layers[index // 2] if index // 2 < len(layers) else None
        value = None if layer is None else (layer.values if index % 2 else layer.keys)
        if layer is not None and layer.is_initialized and value is not None and value.numel():
            _refuse_foreign(layer, index // 2)
            tensors.append(value)
        else:
            heads, width = int(spec.shape[1]), int(spec.shape[3])
            tensors.append(torch.empty(batch, heads, 0, width, dtype=spec.dtype, device=device))
    return tensors


def write_cache(cache: Cache, present: list[Tensor]) -> None:
    """Replace the contents of a cache by what the graph returned, in place."""
    own: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for index in range(len(present) // 2):
        if index >= len(own.layers):
            own.layers.append(DynamicLayer())
        elif type(own.layers[index]) is not DynamicLayer:
            own.layers[index] = DynamicLayer()
        layer = own.layers[index]
        layer.keys, layer.values = present[2 * index], present[2 * index + 1]
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        layer.is_initialized = True


def _layers(cache: Cache | None) -> list[Any]:
    if cache is None:
        return []
    own: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, DynamicCache):
        raise InputError(
            f"the cache is a {type(cache).__name__}; the program continues DynamicCache. Use "
            "the default cache implementation."
        )
    return list(own.layers)


def _refuse_foreign(layer: Any, index: int) -> None:
    kept = layer.keys.shape[-2]
    if layer.get_seq_length() != kept:
        raise InputError(
            f"layer {index} of the cache has dropped old tokens ({kept} of "
            f"{layer.get_seq_length()} kept): it was made by the original model. Start from an "
            "empty cache."
        )
