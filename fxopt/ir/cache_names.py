"""What transformers calls the cache of keys and values that a model takes and returns."""

from transformers.modeling_outputs import BaseModelOutputWithPast

# `cache` since transformers 5.24, `past_key_values` before; a model with code of its own may use
# either with either.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(n for n in CACHE_NAMES if n in BaseModelOutputWithPast.__dataclass_fields__)
