"""The key/value cache at run time: an HF cache whose layers hold what the graph returned."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from fxopt.errors import InputError
from fxopt.ir.signature import Signature
from fxopt.ir.state_form import DENSE, StateForm
from fxopt.runtime.state_layer import StateLayer


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
    layers = _layers(cache)
    tensors: list[Tensor] = []
    forms = signature.cache.states
    for index, empty in enumerate(signature.empty_state(batch, device)):
        layer = layers[index // 2] if index // 2 < len(layers) else None
        held = None
        if layer is not None and layer.is_initialized:
            own = (forms[index - index % 2], forms[index - index % 2 + 1])
            held = _held(layer, index // 2, own)[index % 2]
        tensors += empty if held is None else held
    return tensors


def write_cache(signature: Signature, cache: Cache, present: list[Tensor]) -> None:
    """Replace the contents of a cache by what the graph returned, in place."""
    assert signature.cache is not None  # noqa: S101 - callers ask only programs with a cache
    own: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    forms, states = signature.cache.states, signature.cache.split(present)
    for index in range(signature.cache.layers):
        pair = slice(2 * index, 2 * index + 2)
        held = own.layers[index] if index < len(own.layers) else None
        layer = _filled(held, forms[pair], states[pair])
        if held is None:
            own.layers.append(layer)
        else:
            own.layers[index] = layer


def _filled(layer: Any, forms: tuple[StateForm, ...], states: list[list[Tensor]]) -> Any:
    if any(form.dtype for form in forms):
        return StateLayer(forms, states)
    # The attributes of a layer are not declared alike in all releases of transformers.
    dense: Any = layer if type(layer) is DynamicLayer else DynamicLayer()
    dense.keys, dense.values = states[0][0], states[1][0]
    dense.dtype, dense.device = dense.keys.dtype, dense.keys.device
    dense.is_initialized = True
    return dense


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


def _held(layer: Any, index: int, forms: tuple[StateForm, ...]) -> tuple[Any, Any]:
    """Keys and values of a layer in the program's forms; None where it holds nothing."""
    found = layer.forms if isinstance(layer, StateLayer) else (DENSE, DENSE)
    if found != forms:
        raise InputError(
            f"layer {index} of the cache holds keys as {found[0].describe()} and values as "
            f"{found[1].describe()}; the program holds {forms[0].describe()} and "
            f"{forms[1].describe()}. Caches of the original model, or of another program, are not "
            "continued: start from an empty cache."
        )
    if isinstance(layer, StateLayer):
        return tuple(layer.states)  # type: ignore[return-value]
    if layer.keys is None or not layer.keys.numel():
        return None, None
    _refuse_foreign(layer, index)
    return [layer.keys], [layer.values]


def _refuse_foreign(layer: Any, index: int) -> None:
    kept = layer.keys.shape[-2]
    if layer.get_seq_length() != kept:
        raise InputError(
            f"layer {index} of the cache has dropped old tokens ({kept} of "
            f"{layer.get_seq_length()} kept): it was made by the original model. Start from an "
            "empty cache."
        )
