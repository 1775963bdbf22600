"""Example inputs for a model: those the user gave, or made up from an HF model's config."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxopt.capture.cache import cache_parameter, returned_cache, tensors_from_cache
from fxopt.capture.configs import configs_of, dense_shape, vocabulary_size
from fxopt.capture.tensors import (
    largest_difference,
    output_tensors,
    same_tensors,
    take_cyclic,
)
from fxopt.errors import CaptureError, InputError
from fxopt.ir.signature import default_tensor

# What an optional input may mean when it is left out. Which of them holds is found by running
# the model both ways, never assumed.
DEFAULTS = ("ones", "zeros", "arange")
_OPTIONAL = (
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "decoder_attention_mask",
    "decoder_position_ids",
)
BATCH, SEQUENCE, PAST = "batch", "sequence", "past"


@dataclass(frozen=True)
class Sizes:
    """The dynamic sizes at which a model is run."""

    batch: int
    sequence: int
    past: int = 0
    source: int = 6  # the encoder's side of an encoder-decoder


CAPTURE_SIZES = Sizes(batch=2, sequence=7, past=5, source=6)


@dataclass
class ExampleInputs:
    """Keyword tensors for one run of a model, with names for their dimensions."""

    tensors: dict[str, Tensor]
    dimensions: dict[str, tuple[str | None, ...]] = field(
        default_factory=dict[str, tuple[str | None, ...]]
    )
    past: list[Tensor] = field(default_factory=list[Tensor])


class InputFactory:
    """Makes random inputs of any size for an HF model, from its config and signature."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.takes_use_cache = "use_cache" in self.parameters
        self.cache_parameter = cache_parameter(self.parameters)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.names: list[str] = []
        self.given: dict[str, Tensor] = {}
        self.all_given: dict[str, Tensor] | None = None
        self.defaults: dict[str, str] = {}
        self.optional: list[str] = []
        self.past_shapes: list[tuple[int, ...]] = []
        self.dtype = next(
            (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
        )

    def make(self, sizes: Sizes, seed: int = 0) -> ExampleInputs:
        """Inputs of the given sizes; optional inputs at their defaults; a random cache."""
        generator = torch.Generator().manual_seed(seed)
        example = ExampleInputs({})
        for name in self.names:
            value, dimensions = self._required(name, sizes, generator)
            example.tensors[name], example.dimensions[name] = value, dimensions
        past = sizes.past if self.past_shapes else 0
        for name in self.optional:
            value, dimensions = self.optional_input(name, sizes, past)
            example.tensors[name], example.dimensions[name] = value, dimensions
        for shape in self.past_shapes:
            example.past.append(
                torch.randn(sizes.batch, shape[1], past, shape[3], generator=generator).to(
                    self.dtype
                )
            )
        return example

    def _required(
        self, name: str, sizes: Sizes, generator: torch.Generator
    ) -> tuple[Tensor, tuple[str | None, ...]]:
        if name in self.given:
            return self._resize(self.given[name], name, sizes)
        if name.endswith("input_ids"):
            source_side = self.encoder_decoder and not name.startswith("decoder_")
            length = sizes.source if source_side else sizes.sequence
            ids = self._token_ids(sizes.batch, length, generator)
            return ids, (BATCH, "source" if source_side else SEQUENCE)
        shape = dense_shape(self.model, name)
        value = torch.randn(sizes.batch, *shape, generator=generator).to(self.dtype)
        return value, (BATCH, *(None for _ in shape))

    def _resize(
        self, given: Tensor, name: str, sizes: Sizes
    ) -> tuple[Tensor, tuple[str | None, ...]]:
        """The user's example at another batch size and, for token ids, another length."""
        resized = take_cyclic(given, 0, sizes.batch)
        tokenwise = name.endswith("input_ids") or name in _OPTIONAL
        if not tokenwise or given.dim() != 2:
            return resized, (BATCH, *(None for _ in given.shape[1:]))
        source_side = self.encoder_decoder and not name.startswith("decoder_")
        length = sizes.source if source_side else sizes.sequence
        return take_cyclic(resized, 1, length), (BATCH, "source" if source_side else SEQUENCE)

    def _token_ids(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        vocabulary = vocabulary_size(self.model)
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        # A padding or end token in the middle means something to some models.
        special = {
            int(value)
            for config in configs_of(self.model.config)
            for key in ("pad_token_id", "eos_token_id", "bos_token_id")
            if isinstance(value := getattr(config, key, None), int) and value >= 0
        }
        ordinary = next((i for i in range(vocabulary - 1, -1, -1) if i not in special), 0)
        for value in special:
            ids[ids == value] = ordinary
        end = getattr(self.model.config, "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary and _pools_at_end(self.model):
            ids[:, -1] = end
        return ids

    def optional_input(
        self, name: str, sizes: Sizes, past: int, default: str = "ones"
    ) -> tuple[Tensor, tuple[str | None, ...]]:
        """An optional input that says nothing beyond `default`."""
        source_side = self.encoder_decoder and not name.startswith("decoder_")
        length = sizes.source if source_side else sizes.sequence
        first = 0 if source_side else past
        whole = name.endswith("attention_mask")
        columns = length + first if whole else length
        axis = "source" if source_side else (f"{PAST}_{SEQUENCE}" if whole else SEQUENCE)
        default = self.defaults.get(name, default)
        return default_tensor(default, sizes.batch, columns, first, torch.device("cpu")), (
            BATCH,
            axis,
        )

    # --- discovery --------------------------------------------------------------------------

    def discover(self, given: dict[str, Tensor] | None = None) -> None:
        """Find the inputs the model needs and its optional ones, by running it.

        Examples that the user gave decide which inputs there are; their optional inputs are
        still looked for.

        Raises:
            InputError: no combination of inputs that can be made up runs.
        """
        if given is not None:
            self.all_given = given
            self.given = {k: v for k, v in given.items() if k not in _OPTIONAL}
            self.names = list(self.given)
            self._try_given()
            self._discover_use_cache()
            self._discover_optional()
            return
        problems: list[str] = []
        for names in self._candidates():
            self.names = names
            try:
                self.run(self.make(Sizes(2, 7)))
                break
            except InputError:
                raise
            except Exception as error:
                problems.append(f"{', '.join(names)}: {type(error).__name__}: {str(error)[:160]}")
        else:
            raise InputError(
                f"{type(self.model).__name__} does not run on any inputs fxopt can make up "
                f"({'; '.join(problems)}). Pass example_inputs={{...}}."
            )
        self._discover_use_cache()
        self._discover_optional()

    def _discover_use_cache(self) -> None:
        """Whether `use_cache` reaches the model although its forward does not name it."""
        if self.takes_use_cache or self.cache_parameter is None:
            return
        tensors = self.make(Sizes(2, 7)).tensors
        try:
            with torch.no_grad():
                output = self.model(**tensors, use_cache=False)
        except TypeError:
            return  # nobody takes it
        self.takes_use_cache = returned_cache(output) is None

    def _try_given(self) -> None:
        shapes = ", ".join(f"{n} {list(t.shape)} {t.dtype}" for n, t in self.given.items())
        try:
            self.run(self.make(Sizes(2, 7)))
        except Exception as error:
            raise InputError(
                f"{type(self.model).__name__} does not run on its example_inputs ({shapes}) at "
                f"batch 2, length 7: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    def _candidates(self) -> Iterator[list[str]]:
        main = self.model.main_input_name
        first = [main]
        if self.encoder_decoder and "decoder_input_ids" in self.parameters:
            first.append("decoder_input_ids")
        yield first
        others = ("pixel_values", "input_features", "input_values", "input_ids")
        extra = [n for n in others if n in self.parameters and n not in first]
        for name in extra:
            yield [*first, name]

    def _discover_optional(self) -> None:
        sizes = Sizes(2, 7)
        reference = self._reference(sizes)
        for name in _OPTIONAL:
            if name not in self.parameters:
                continue
            default = self._meaning(name, sizes, reference)
            if default is None:
                self._keep_given(name)
                continue
            self.optional.append(name)
            self.defaults[name] = default
            reference = self._reference(sizes)

    def _meaning(self, name: str, sizes: Sizes, reference: list[list[Tensor]]) -> str | None:
        """The default that leaving an input out comes nearest to, or None.

        The nearest, not the first near enough: rotary positions that are all alike change little
        where the weights are small.
        """
        apart: dict[str, float] = {}
        for default in DEFAULTS:
            found = self._distance(name, default, sizes, reference)
            if found is not None:
                apart[default] = found
            if found == 0:
                break
        return min(apart, key=apart.__getitem__, default=None)

    def _reference(self, sizes: Sizes) -> list[list[Tensor]]:
        """Results with what is known so far: without padding, and padded where there is a mask."""
        plain = self.make(sizes)
        return [self.run(plain), self.run(self._padded(sizes))]

    def _padded(self, sizes: Sizes) -> ExampleInputs:
        example = self.make(sizes)
        for name, value in example.tensors.items():
            if name.endswith("attention_mask"):
                value[-1, :2] = 0
        return example

    def _distance(
        self, name: str, default: str, sizes: Sizes, reference: list[list[Tensor]]
    ) -> float | None:
        """How far results move when an input gets its default; None where that is not the same.

        Some models work out positions from the mask, so it must hold on padded inputs as well.
        """
        apart = 0.0
        for example, expected in zip(
            (self.make(sizes), self._padded(sizes)), reference, strict=True
        ):
            example.tensors[name] = self.optional_input(name, sizes, 0, default)[0]
            try:
                results = self.run(example)
            except Exception:
                return None  # this default does not fit; the next may
            if not same_tensors(expected, results):
                return None
            apart = max(apart, largest_difference(expected, results))
        asked = self.make(sizes)
        asked.tensors[name] = self.optional_input(name, sizes, 0, default)[0]
        return apart if self._takes(name, asked) else None

    def _keep_given(self, name: str) -> None:
        """An optional input that the user gave and no default explains is a required one."""
        if self.all_given is not None and name in self.all_given:
            self.given[name] = self.all_given[name]
            self.names.append(name)

    def _takes(self, name: str, example: ExampleInputs) -> bool:
        """Whether the model also runs when the input says something.

        An all-ones mask may have been skipped without a look at its shape.
        """
        if name.endswith("attention_mask"):
            example.tensors[name][-1, 0] = 0
        try:
            self.run(example)
        except Exception:
            return False
        return True

    def discover_cache(self) -> str | None:
        """Find the shapes of the key/value cache; returns why there is none, or None."""
        if self.cache_parameter is None or not self.takes_use_cache:
            return "the model's forward takes no cache"
        if not getattr(self.model.config.get_text_config(decoder=True), "use_cache", True):
            return "config.use_cache is False"
        try:
            with torch.no_grad():
                output = self.model(**self.make(Sizes(2, 7)).tensors, use_cache=True)
        except Exception as error:
            return f"with use_cache=True it raises {type(error).__name__}: {str(error)[:160]}"
        cache = returned_cache(output)
        if cache is None:
            return "the model returns no cache"
        try:
            tensors = tensors_from_cache(cache)
        except CaptureError as error:
            return str(error)
        self.past_shapes = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
        return None

    @torch.no_grad()
    def run(self, example: ExampleInputs) -> list[Tensor]:
        """All tensors of the model's result, caches left out."""
        extra = {"use_cache": False} if self.takes_use_cache else {}
        output = self.model(**example.tensors, **extra)
        return output_tensors(output)


def _pools_at_end(model: nn.Module) -> bool:
    return not bool(getattr(model, "can_generate", lambda: False)())
