"""Read sizes out of HF configs, which nest and name them in several ways."""

from collections.abc import Iterator
from typing import Any


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
