"""Read sizes of inputs out of HF configs, which nest and name them in several ways."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from fxopt.errors import InputError


def configs_of(config: Any) -> Iterator[Any]:
    """A config and those nested in it: a model of several modalities has one for each."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        child = getattr(config, key, None)
        if child is not None:
            yield from configs_of(child)


def first_size(configs: list[Any], *keys: str) -> int | None:
    """The first positive number that any of the configs has under any of the keys."""
    for config in configs:
        for key in keys:
            value = getattr(config, key, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return None


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model knows; the smallest where its parts know different ones."""
    sizes = [getattr(config, "vocab_size", None) for config in configs_of(model.config)]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    if known:
        return min(known)
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def dense_shape(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The shape of one example of an image or sound input.

    Raises:
        InputError: the config does not tell it.
    """
    configs = list(configs_of(model.config))
    if name == "pixel_values":
        size = first_size(configs, "image_size")
        channels = first_size(configs, "num_channels") or 3
        if size is not None:
            return channels, size, size
    if name == "input_features":
        bands = first_size(configs, "num_mel_bins", "feature_size", "input_feat_per_channel")
        frames = first_size(configs, "max_source_positions")
        if bands is not None and frames is not None:
            return bands, 2 * frames
    if name == "input_values":
        return (16000,)
    raise InputError(
        f"cannot make an example for input {name!r} of {type(model).__name__}: its "
        "config does not tell the shape. Pass example_inputs={...} to fxopt."
    )
