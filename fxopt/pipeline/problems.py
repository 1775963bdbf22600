"""What is wrong with a recipe: each problem has a place, a reason and the nearest valid name."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from fxopt.errors import RecipeError

_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}
_CHOICE = {"literal_error", "enum"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe, and where."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.place else self.reason


def refuse(origin: str, problems: Sequence[Problem]) -> RecipeError:
    """One error that lists every problem of a recipe."""
    if len(problems) == 1:
        return RecipeError(f"{origin}: {problems[0]}")
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return RecipeError(f"{origin} has {len(problems)} problems:\n{lines}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence with the valid name nearest to `name`; empty where none is near."""
    # Who writes the beginning of a name may mean the first that goes on so.
    begun = [option for option in valid if option.startswith(f"{name}-")]
    found = begun[:1] or difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"Did you mean {found[0]!r}?" if found else ""


def problems_of(error: ValidationError, place: str, model: Any) -> list[Problem]:
    """A pydantic error in the words of a recipe."""
    return [_problem(dict(details), place, model) for details in error.errors(include_url=False)]


def _problem(details: dict[str, Any], place: str, model: Any) -> Problem:
    path = tuple(details["loc"])
    where = format_place(place, path)
    given = details.get("input")
    if details["type"] in _UNKNOWN_KEY:
        valid = field_names(model, path[:-1])
        advice = nearest(str(path[-1]), valid) or f"It may be {', '.join(valid) or 'nothing'}."
        return Problem(where, f"unknown key. {advice}")
    if details["type"] == "missing":
        return Problem(where, "this key is required")
    if details["type"] in _CHOICE:
        expected = str(details.get("ctx", {}).get("expected", ""))
        near = nearest(str(given), re.findall(r"'([^']*)'", expected))
        return Problem(where, f"{given!r} is not one of {expected}. {near}".strip())
    message = str(details["msg"]).removeprefix("Value error, ")
    shown = repr(given) if len(repr(given)) <= 60 else type(given).__name__
    return Problem(where, f"{message[:1].lower()}{message[1:]}, found {shown}")


def format_place(place: str, path: Iterable[Any]) -> str:
    """`passes`, 1, `quantize` as `passes[1].quantize`."""
    for part in path:
        if isinstance(part, int):
            place = f"{place}[{part}]"
        else:
            place = f"{place}.{part}" if place else str(part)
    return place


def field_names(model: Any, path: Sequence[Any]) -> list[str]:
    """The names of the fields that exist at a path inside a model or dataclass."""
    candidates = [model]
    for part in path:
        candidates = [
            inner for candidate in candidates for inner in _models_in_field(candidate, part)
        ]
    return sorted({name for candidate in candidates for name in _hints(candidate)})


def _models_in_field(model: Any, part: Any) -> list[Any]:
    hints = _hints(model)
    # A list index or a mapping's key leads into the same annotation; a field's name into its own.
    return _models_in(hints[part]) if part in hints else [model]


def _hints(model: Any) -> dict[str, Any]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    hints = typing.get_type_hints(model)
    return {field.name: hints[field.name] for field in dataclasses.fields(model)}


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and (
        dataclasses.is_dataclass(annotation) or issubclass(annotation, BaseModel)
    ):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]
