"""Options of passes: found, validated and turned into passes.

A pass is registered when its module is imported; every module under `fxopt/passes` is, so a new
file there is found by itself.
"""

import dataclasses
import importlib
import json
import pkgutil
import typing
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fxopt.errors import FxoptError
from fxopt.passes.base import Pass, registered_passes
from fxopt.pipeline.problems import Problem, nearest, problems_of

_STRICT = ConfigDict(extra="forbid", strict=True)


@cache
def _import_passes() -> None:
    # Not `fxopt.passes`: that attribute of the package is the public function of the same name.
    package = importlib.import_module("fxopt.passes")
    for found in pkgutil.walk_packages(package.__path__, "fxopt.passes."):
        importlib.import_module(found.name)


def known_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, those of fxopt and those of the user."""
    _import_passes()
    return registered_passes()


def options_adapter(cls: type[Pass]) -> TypeAdapter[Pass]:
    """The validator of a pass's options: unknown keys refused, no value silently converted."""
    _refuse_extra_keys(cls)
    return TypeAdapter(cls)


def build_pass(
    name: str, options: dict[str, Any], place: str, problems: list[Problem]
) -> Pass | None:
    """Make a pass from recipe data; whatever is wrong with it is added to `problems`."""
    passes = known_passes()
    if name not in passes:
        advice = nearest(name, list(passes)) or f"There are {', '.join(passes) or 'none'}."
        problems.append(Problem(place, f"there is no pass called {name!r}. {advice}"))
        return None
    place = f"{place}.{name}"
    try:
        # Validated as JSON, so that a list may stand for a tuple and nothing else is converted.
        return options_adapter(passes[name]).validate_json(json.dumps(options))
    except ValidationError as error:
        problems += problems_of(error, place, passes[name])
    except FxoptError as error:
        problems.append(Problem(place, str(error)))
    except (TypeError, ValueError, RecursionError) as error:
        problems.append(Problem(place, f"the options are not plain data: {error}"))
    return None


def _refuse_extra_keys(cls: Any) -> None:
    """Mark a dataclass, and those among its fields' types, as strict.

    pydantic ignores unknown keys of a standard dataclass unless the class says otherwise.
    """
    if "__pydantic_config__" in vars(cls):
        return
    cls.__pydantic_config__ = _STRICT
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for part in dataclasses_in(hints[field.name]):
            _refuse_extra_keys(part)


def dataclasses_in(annotation: Any) -> list[Any]:
    """The dataclasses that an annotation mentions: `X | None`, `list[X]` and `X` itself."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in dataclasses_in(part)]
