"""The public verbs: optimize, capture, load, diff."""

import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from fxopt.capture import capture_program
from fxopt.errors import InputError, LoadError, RecipeError
from fxopt.ir.diff import Diff
from fxopt.ir.diff import diff as diff_programs
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Program
from fxopt.lowering import Lowered, LoweringOptions, lower, resolve_target
from fxopt.lowering.call import lowered_call
from fxopt.lowering.device import move_program
from fxopt.pipeline.lazy_samples import LazySamples
from fxopt.pipeline.lowered_check import check_lowered
from fxopt.pipeline.manager import Expectation, Manager, Progress, ignore_replaced
from fxopt.pipeline.parking import Parking
from fxopt.pipeline.recipe import Recipe, presets
from fxopt.pipeline.report import Report, build_report
from fxopt.pipeline.tokenizer import load_tokenizer
from fxopt.pipeline.verify import Floor, Verifier
from fxopt.progress import bar
from fxopt.runtime.folder import StoredModel, fit_for_use, read_folder
from fxopt.runtime.generation import build_pretrained
from fxopt.runtime.optimized import OptimizedModel

# Above this size the checks run on two input sets instead of all; each still covers every layer.
_LARGE_MODEL_BYTES = 200_000_000

# Tracing changes what the whole process shares: functions of torch and transformers, and the model.
_TRACING = threading.RLock()
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _one_at_a_time(verb: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let other threads wait until the verb is done."""

    @functools.wraps(verb)
    def locked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _TRACING:
            return verb(*args, **kwargs)

    return locked


@_one_at_a_time
def optimize(
    model: nn.Module,
    recipe: Any,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    target: str = "auto",
    verify: str | None = None,
    inplace: bool = False,
    progress: bool | Progress = True,
) -> OptimizedModel:
    """Capture a model, rewrite it by a recipe, check every rewrite, and lower the result.

    Args:
        model: an HF model or any nn.Module; left untouched unless `inplace`.
        recipe: a preset's name, a path, a dict, a Recipe, or a list of passes.
        example_inputs: a tuple (positional) or dict (keywords); HF models need none.
        calibration: inputs like the model's own, or texts where there is a tokenizer.
        target: "auto", "reference", "cpu" or "cuda"; overrides the recipe's.
        verify: "full", "fast" or "off"; overrides the recipe's.
        inplace: give up `model`: nothing is copied, weights that a pass replaced wait in temporary
            files, and all are freed at the end, when every pass and every kernel has been
            checked. Whatever fails, fails before that, and the model is as it was.
        progress: show a progress bar, or a callable that is told each stage.

    Returns:
        an object with the model's own call and result type, and `generate` where it has it.

    Raises:
        FxoptError: one of its children; `model` is as it was, and nothing was written.
    """
    resolved = Recipe.resolve(recipe)
    passes = resolved.build()
    if verify not in (None, "full", "fast", "off"):
        raise RecipeError(f"verify={verify!r}; choose 'full', 'fast' or 'off'.")
    with bar(progress, len(passes)) as tell, Parking() as parking:
        started = time.perf_counter()
        tell("capture")
        program = capture_program(model, example_inputs)
        options = _lowering_options(resolved, target)
        resolve_target(program, options.target)  # refused now, before hours of work
        tokenizer = _tokenizer_of(model)
        samples = LazySamples(program, resolved, calibration, tokenizer)
        manager = Manager(
            verifier=_verifier(program, resolved, verify, samples),
            samples=samples,
            expectations={
                name: Expectation(e.min_sites, e.max_sites, e.max_refusals)
                for name, e in resolved.expect.items()
            },
            progress=tell,
            replaced=parking.park if inplace else ignore_replaced,
            lowered_call=lambda program, shape: lowered_call(program, options, shape),
        )
        parking.watch(model, program)
        bytes_before = program.byte_count()
        program = manager.run(program, passes)
        if not inplace:
            _part_from(model, program)
        release_freed_memory(bytes_before)
        tell("lower")
        lowered = lower(program, options)
        release_freed_memory(bytes_before)
        check_lowered(program, lowered, manager.verifier)
        report = build_report(
            model, resolved, program, lowered, bytes_before, time.perf_counter() - started
        )
        optimized = _assemble(model, program, lowered, resolved, report, options)
        if inplace:
            _consume(model)
        return optimized


@_one_at_a_time
def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a model as a Program, checked against the model.

    Raises:
        CaptureError: the model cannot be captured, or its graph differs from it.
    """
    return capture_program(model, example_inputs)


def diff(a: Any, b: Any) -> Diff:
    """What differs between two programs or optimized models, in terms of module paths.

    Raises:
        InputError: one of them is neither.
    """
    return diff_programs(_program_of(a), _program_of(b))


@_one_at_a_time
def load(path: str | Path, target: str = "auto") -> OptimizedModel:
    """Load a folder written by `save_pretrained`; runs no pickled code and no model class.

    Raises:
        LoadError: the folder is damaged, foreign, unsafe, or from a newer fxopt.
    """
    with fit_for_use(path):
        return _use(read_folder(path), target)


def _use(stored: StoredModel, target: str) -> OptimizedModel:
    settings = stored.extra.get("lowering", {})
    options = LoweringOptions(
        target=target if target != "auto" else settings.get("target", "auto"),
        compile=settings.get("compile"),
        speed_gate=settings.get("speed_gate", True),
        decisions=settings.get("decisions"),
    )
    lowered = lower(stored.program, options)
    report = Report.from_dict(stored.report) if stored.report else None
    common: dict[str, Any] = {
        "report": report,
        "recipe": stored.recipe,
        "extra": stored.extra,
        "relower": _relower(options),
    }
    if not stored.config:
        return OptimizedModel(stored.program, lowered.program, **common)
    try:
        config = _config_from(stored.config)
        generation = stored.generation_config
        generation_config = GenerationConfig.from_dict(generation) if generation else None
    except Exception as error:  # transformers checks a config in ways of its own
        raise LoadError(
            f"config.json cannot be used by this transformers ({type(error).__name__}: "
            f"{str(error)[:200]}). Install the version that it was saved with, or save again."
        ) from error
    name = str(stored.extra.get("class_name", "OptimizedModel"))
    return build_pretrained(
        name, stored.program, lowered.program, config, generation_config, **common
    )


def recipes() -> dict[str, str]:
    """The recipes that ship with fxopt, each with its one-line description."""
    return {name: recipe.description for name, recipe in presets().items()}


# --- parts of optimize ----------------------------------------------------------------------


def _tokenizer_of(model: nn.Module) -> Any:
    place = getattr(getattr(model, "config", None), "name_or_path", "")
    return load_tokenizer(str(place), local_files_only=True)


def _verifier(
    program: Program, recipe: Recipe, verify: str | None, samples: LazySamples
) -> Verifier:
    floor = recipe.floor
    inputs: list[Any] = list(program.examples)
    if program.byte_count() > _LARGE_MODEL_BYTES:
        inputs = inputs[1:3] if len(inputs) > 2 else inputs[:2]
    natural = samples.few()
    return Verifier(
        inputs=inputs,
        mode=verify or recipe.verify,
        floor=Floor(floor.sqnr_db, floor.top1, floor.kl) if floor else Floor(),
        natural=natural,
    )


def _part_from(model: nn.Module, program: Program) -> None:
    """Make sure that program and model share no memory."""
    theirs = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    for name, value in program.weights().items():
        if value.untyped_storage().data_ptr() in theirs:
            program.set_weight(name, value.clone())


def _consume(model: nn.Module) -> None:
    """Free the model's weights; those that the program still reads live on in it."""
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    for tensor in tensors:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    release_freed_memory(held)


def _lowering_options(recipe: Recipe, target: str) -> LoweringOptions:
    asked = recipe.lowering
    return LoweringOptions(
        target=target if target != "auto" else asked.target,
        speed_gate=asked.speed_gate,
        compile=asked.compile,
        shapes=asked.shapes,
    )


def _assemble(
    model: nn.Module,
    program: Program,
    lowered: Lowered,
    recipe: Recipe,
    report: Report,
    options: LoweringOptions,
) -> OptimizedModel:
    extra: dict[str, Any] = {
        "class_name": type(model).__name__,
        "lowering": {
            "target": options.target,
            "compile": options.compile,
            "speed_gate": options.speed_gate,
            "decisions": lowered.decisions,
        },
    }
    common: dict[str, Any] = {
        "report": report,
        "recipe": recipe.to_dict(),
        "extra": extra,
        "relower": _relower(options),
    }
    if not isinstance(model, PreTrainedModel):
        return OptimizedModel(program, lowered.program, **common)
    extra["main_input_name"] = model.main_input_name
    extra["can_generate"] = bool(model.can_generate())
    generation: Any = getattr(model, "generation_config", None)
    return build_pretrained(
        type(model).__name__,
        program,
        lowered.program,
        _config_from(model.config.to_dict()),
        GenerationConfig.from_dict(generation.to_dict()) if generation is not None else None,
        **common,
    )


def _relower(options: LoweringOptions) -> Any:
    def relower(program: Program, device: torch.device) -> tuple[Program, Program]:
        moved = move_program(program, device)
        again = LoweringOptions("auto", options.speed_gate, options.compile, options.shapes)
        return moved, lower(moved, again).program

    return relower


def _config_from(data: dict[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    kind = data.get("model_type", "")
    try:
        cls: Any = CONFIG_MAPPING[kind]  # loads the class when asked; its `get` would not
    except KeyError:
        cls = PreTrainedConfig
    return cls.from_dict(data)


def _program_of(value: Any) -> Program:
    if isinstance(value, OptimizedModel):
        return value.program
    if isinstance(value, Program):
        return value
    raise InputError(
        f"asked to compare a {type(value).__name__}; fxopt.diff takes programs and optimized "
        "models. Capture a model first: fxopt.capture(model)."
    )
