"""An optimized HF model: keyword calls, caches, and `generate` from transformers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from fxopt.errors import InputError
from fxopt.ir.cache_names import CACHE_NAME, CACHE_NAMES
from fxopt.ir.program import Program
from fxopt.ir.signature import check_tensors
from fxopt.ir.structure import unflatten
from fxopt.runtime.calling import bind_keywords, convert_integers, fill_defaults
from fxopt.runtime.encoded import EncodedSource, pack_source, unpack_source
from fxopt.runtime.optimized import OptimizedModel, run_graph
from fxopt.runtime.stages import Stages, split_stages
from fxopt.runtime.state import new_cache, read_cache, write_cache


class OptimizedPretrainedModel(OptimizedModel, GenerationMixin):
    """An optimized HF model. It takes what the model takes, and generates where it does."""

    _is_stateful = False
    base_model_prefix = ""

    def __init__(
        self,
        program: Program,
        lowered: Program,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.generation_config: Any = generation_config
        self.stages: Stages | None
        super().__init__(program, lowered, **kwargs)
        self.main_input_name = str(self.extra.get("main_input_name", "input_ids"))
        self.name_or_path = str(getattr(config, "name_or_path", ""))

    def _install(self) -> None:
        super()._install()
        self.stages = None
        if self.lowered.signature.step_inputs:
            self.stages = split_stages(self.lowered, self._compiled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on what the model would take.

        A cache passed as `cache` or `past_key_values` is filled in place and returned.

        Raises:
            InputError: the inputs do not fit the captured signature, or hold two caches.
        """
        bound = bind_keywords(self.signature, args, kwargs)
        cache = _take_cache(bound)
        source: Any = bound.pop("encoder_outputs", None)
        wants_cache = kwargs.get("use_cache")
        if self.signature.cache is None:
            if cache is not None:
                raise InputError("a cache was passed to a program captured without cache.")
            outputs = self._run(bound, [], source)
        else:
            outputs, cache = self._run_with_cache(bound, cache, source)
        result = unflatten(self.signature.output_structure, outputs)
        if isinstance(result, dict):
            self._keep_last_logits(result, kwargs.get("logits_to_keep"))
        if cache is not None and wants_cache is not False and isinstance(result, ModelOutput):
            result[CACHE_NAME] = cache
        if kwargs.get("return_dict") is False and isinstance(result, ModelOutput):
            return result.to_tuple()
        return result

    def _run_with_cache(
        self, bound: dict[str, Any], cache: Cache | None, source: Any
    ) -> tuple[list[Tensor], Cache]:
        count = self.signature.cache.count
        given = next((v for v in bound.values() if isinstance(v, Tensor)), None)
        if given is None:
            raise InputError("no input tensor was passed.")
        steps = [spec.name for spec in self.signature.inputs if spec.name in bound]
        rows = next((bound[n] for n in steps if n in self.signature.step_inputs), given)
        past = read_cache(self.signature, cache, rows.shape[0], rows.device)
        outputs = self._run(bound, past, source)
        if cache is None:
            cache = new_cache(bool(self.signature.step_inputs))
        write_cache(self.signature, cache, outputs[-count:])
        return outputs[:-count], cache

    def _run(self, bound: dict[str, Any], past: list[Tensor], source: Any) -> list[Tensor]:
        length = self.signature.cache.length(past) if past else 0
        specs = self.signature.inputs[: len(self.signature.inputs) - len(past)]
        if source is None:
            fill_defaults(self.signature, specs, bound, length)
            return self.run_flat([bound[spec.name] for spec in specs] + past)
        return self._run_step(bound, past, source, length)

    def _keep_last_logits(self, result: dict[str, Any], keep: Any) -> None:
        logits = result.get("logits")
        if isinstance(keep, Tensor) and isinstance(logits, Tensor):
            result["logits"] = logits[:, keep]
        elif isinstance(keep, int) and keep > 0 and isinstance(logits, Tensor):
            result["logits"] = logits[:, -keep:]

    # --- encoder-decoder --------------------------------------------------------------------

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """What is computed once per text, as a module that `generate` can call."""
        del modality
        if self.stages is None:
            raise InputError("the model has no encoder.")
        return _Encoder(self)

    def encode(self, **kwargs: Any) -> EncodedSource:
        """Run the first stage: the encoder and everything else that no token changes."""
        assert self.stages is not None  # noqa: S101 - get_encoder asked
        names = self.stages.source_inputs
        bound = bind_keywords(self.signature, (), kwargs)
        specs = [spec for spec in self.signature.inputs if spec.name in names]
        fill_defaults(self.signature, specs, bound, 0)
        inputs = self._checked(names, bound)
        values = run_graph(self.stages.source, inputs)
        masks = {name: bound[name] for name in names if name in self.signature.defaults}
        return pack_source(self.stages, values, masks)

    def _run_step(
        self, bound: dict[str, Any], past: list[Tensor], source: Any, length: int
    ) -> list[Tensor]:
        if self.stages is None:
            raise InputError("encoder_outputs were passed to a model that has no encoder.")
        names = self.stages.step_inputs
        count = len(self.signature.inputs) - len(past)
        given, held = self.signature.inputs[:count], self.signature.inputs[count:]
        convert_integers(given, bound)
        carried = unpack_source(self.stages, source, bound)
        fill_defaults(self.signature, [s for s in given if s.name in names], bound, length)
        bound |= dict(zip((spec.name for spec in held), past, strict=True))
        steps = self._checked(names, bound)
        return run_graph(self.stages.step, [*carried, *steps])

    def _checked(self, names: Sequence[str], bound: Mapping[str, Any]) -> list[Tensor]:
        """The inputs of those names, which one stage takes, in the stage's order."""
        specs = [spec for spec in self.signature.inputs if spec.name in names]
        check_tensors(specs, [bound[spec.name] for spec in specs])
        return [bound[name] for name in names]

    # --- what transformers asks of a model ---------------------------------------------------

    def can_generate(self) -> bool:
        """Whether the original model generates."""
        return bool(self.extra.get("can_generate", False))

    def is_remote_code(self) -> bool:
        """No code of the model's own is left."""
        return False

    def get_experts_implementation(self) -> dict[str, str | None]:
        """Experts are operators of the graph."""
        return {}

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        del args, kwargs
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "dynamic_full"):
            raise InputError(
                f"cache_implementation={implementation!r}: an optimized model keeps its own cache. "
                "Leave it out."
            )
        if self.signature.cache is None or generation_config.use_cache is False:
            if self.signature.cache is None:
                generation_config.use_cache = False
            return
        if model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = new_cache(bool(self.signature.step_inputs))

    def _config_dict(self) -> dict[str, Any] | None:
        return self.config.to_dict()

    def _generation_config_dict(self) -> dict[str, Any] | None:
        return None if self.generation_config is None else self.generation_config.to_dict()


class _Encoder(nn.Module):
    def __init__(self, model: OptimizedPretrainedModel) -> None:
        super().__init__()
        # Not a submodule: the model would become its own child.
        object.__setattr__(self, "_owner", model)

    def forward(self, **kwargs: Any) -> EncodedSource:
        for flag in ("output_attentions", "output_hidden_states", "return_dict"):
            kwargs.pop(flag, None)
        owner: Any = self._owner
        known = {spec.name for spec in owner.signature.inputs}
        return owner.encode(**{k: v for k, v in kwargs.items() if k in known})


def _take_cache(bound: dict[str, Any]) -> Cache | None:
    given = {name: bound.pop(name) for name in CACHE_NAMES if name in bound}
    if len(given) > 1:
        raise InputError(
            f"the call passes {' and '.join(map(repr, given))}; both are names of the one cache "
            f"that the model continues. Pass {CACHE_NAME!r} alone."
        )
    return next(iter(given.values()), None)


def pretrained_class(name: str, program: Program) -> type[OptimizedPretrainedModel]:
    """A class whose `forward` has the model's own parameters: transformers reads them."""
    signature = program.signature
    accepted = [spec.name for spec in signature.inputs if not spec.name.startswith("past_")]
    accepted += [n for n in signature.ignored if n not in accepted]
    accepted += [CACHE_NAME, "use_cache", "logits_to_keep", "return_dict"]
    if signature.step_inputs:
        accepted.append("encoder_outputs")

    def forward(self: OptimizedPretrainedModel, *args: Any, **kwargs: Any) -> Any:
        return OptimizedPretrainedModel.forward(self, *args, **kwargs)

    forward.__doc__ = OptimizedPretrainedModel.forward.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", kind)]
        + [inspect.Parameter(n, kind, default=None) for n in accepted]
        + [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    )
    return type(name, (OptimizedPretrainedModel,), {"forward": forward})


def build_pretrained(
    name: str,
    program: Program,
    lowered: Program,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    **kwargs: Any,
) -> OptimizedPretrainedModel:
    """An optimized HF model under its original class name, which pipelines look at."""
    cls = pretrained_class(name, program)
    return cls(program, lowered, config, generation_config, **kwargs)


__all__ = ["EncodedSource", "OptimizedPretrainedModel", "build_pretrained"]
