"""Recipe: which passes run, in which order, and what they must achieve; validated data."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from fxopt.errors import RecipeError
from fxopt.passes.base import Pass
from fxopt.pipeline.options import build_pass, known_passes, options_adapter
from fxopt.pipeline.order import order_problems
from fxopt.pipeline.problems import Problem, nearest, problems_of, refuse

FORMAT_VERSION = 1
SUFFIXES = (".yaml", ".yml", ".json")

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Entry = str | dict[str, dict[str, Any] | None]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Lowering(_Section):
    """How the program is turned into fast code.

    Attributes:
        target: the kernels to use; "auto" is the model's own device.
        speed_gate: keep the original of every site where the kernel is not faster.
        compile: hand the lowered graph to a compiler.
        shapes: [batch, length] pairs at which the speed gate times a site; without them the
            program's kind decides (decode and prefill where there is a cache).
    """

    target: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    speed_gate: Switch = True
    compile: Literal["inductor"] | None = None
    shapes: tuple[tuple[Positive, Positive], ...] = ()


class CalibrationData(_Section):
    """How much calibration data is read.

    Fields:
        joined: a sample is as many texts, with blank lines between them, as fill max_length.
    """

    samples: Positive = 64
    max_length: Positive = 128
    batch_size: Positive = 8
    joined: Switch = False


class Expectation(_Section):
    """What a pass must do; the run fails otherwise."""

    min_sites: Count | None = None
    max_sites: Count | None = None
    max_refusals: Count | None = None


class Floor(_Section):
    """How much the recipe may cost at any output; the run fails otherwise."""

    sqnr_db: Number | None = None
    top1: Annotated[Number, Field(ge=0, le=1)] | None = None
    kl: Annotated[Number, Field(ge=0)] | None = None


class Recipe(_Section):
    """A list of passes with their options, and what is asked of the result."""

    fxopt: Annotated[int, Field(strict=True)] = FORMAT_VERSION
    name: str = "custom"
    description: str = ""
    passes: tuple[Entry, ...]
    lowering: Lowering = Lowering()
    calibration: CalibrationData = CalibrationData()
    expect: dict[str, Expectation] = Field(default_factory=dict[str, Expectation])
    floor: Floor | None = None
    verify: Literal["full", "fast", "off"] = "full"

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_with_all_problems(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a mapping of keys to values, not {_kind(data)}.")
        problems = list(_version_problems(data.get("fxopt", FORMAT_VERSION)))
        recipe: Self | None = None
        try:
            recipe = handler(data)
        except ValidationError as error:
            # `pass_problems` says the same about single passes in fewer words.
            found = problems_of(error, "", cls)
            problems += [problem for problem in found if not problem.place.startswith("passes[")]
        problems += pass_problems(data.get("passes"), data.get("expect"))
        if problems or recipe is None:
            raise refuse(f"recipe {str(data.get('name', 'custom'))!r}", problems)
        return recipe

    @classmethod
    def resolve(cls, value: Any) -> "Recipe":
        """The recipe that a preset's name, a path, a mapping or a list of passes stands for.

        Raises:
            RecipeError: anything is wrong with it; one error lists every problem.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            return cls.model_validate({str(key): item for key, item in value.items()})
        if isinstance(value, Path):
            return _read(value)
        if isinstance(value, str):
            return _named(value)
        if isinstance(value, Sequence):
            return cls(passes=tuple(_entry(item, i) for i, item in enumerate(value)))
        raise RecipeError(
            f"a recipe is a preset's name, a path, a mapping, a Recipe or a list of passes, "
            f"not {_kind(value)}."
        )

    def entries(self) -> list[tuple[str, dict[str, Any]]]:
        """Each pass's name with its options."""
        return [_name_and_options(entry) for entry in self.passes]

    def build(self) -> list[Pass]:
        """The passes, ready to run.

        Raises:
            RecipeError: a pass is unknown here, or its options are wrong.
        """
        problems: list[Problem] = []
        built = _build_all(self.passes, problems)
        if problems:
            raise refuse(f"recipe {self.name!r}", problems)
        return [item for item in built if item is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default spelled out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file that `resolve` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """A JSON schema for editors, with the options of every registered pass."""
        schema = cls.model_json_schema()
        passes = known_passes()
        adapters = [(name, "validation", options_adapter(p)) for name, p in passes.items()]
        options, shared = TypeAdapter.json_schemas(adapters)  # type: ignore[arg-type]
        schema["$defs"] = {**schema.get("$defs", {}), **shared.get("$defs", {})}
        with_options = [
            {
                "type": "object",
                "description": passes[name].summary(),
                "properties": {name: {"anyOf": [options[name, "validation"], {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
            for name in passes
        ]
        schema["properties"]["passes"]["items"] = {"anyOf": [{"enum": list(passes)}, *with_options]}
        return schema


# --- where recipes come from ----------------------------------------------------------------


@cache
def _preset_files() -> dict[str, str]:
    folder = resources.files("fxopt.pipeline") / "recipes"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {
        entry.name.removesuffix(".yaml"): entry.read_text("utf-8")
        for entry in sorted(files, key=lambda entry: entry.name)
    }


def presets() -> dict[str, Recipe]:
    """The recipes that ship with fxopt."""
    return {name: _parse(text, f"preset {name}") for name, text in _preset_files().items()}


def _named(value: str) -> Recipe:
    if value in _preset_files():
        return _parse(_preset_files()[value], f"preset {value}")
    path = Path(value)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        return _read(path)
    advice = f"{nearest(value, _preset_files())} There are {', '.join(_preset_files())}."
    raise RecipeError(
        f"there is no preset called {value!r}. {advice.lstrip()} A file is given by a path that "
        f"ends in {' or '.join(SUFFIXES)}."
    )


def _read(path: Path) -> Recipe:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {str(path)!r}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error}") from error
    return _parse(text, str(path), path.stem)


def _parse(text: str, origin: str, name: str = "custom") -> Recipe:
    try:
        data: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{origin} holds {_kind(data)}; a recipe is a mapping with `passes:`.")
    return Recipe.model_validate({"name": name, **{str(key): data[key] for key in data}})


def _entry(item: Any, index: int) -> Entry:
    if not isinstance(item, Pass):
        return item
    if known_passes().get(getattr(item, "name", "")) is not type(item):
        raise RecipeError(
            f"passes[{index}]: {type(item).__name__} is not registered. Decorate the class with "
            "@fxopt.passes.base.register(name), so that the recipe can be stored and read back."
        )
    return {item.name: item.options()} if item.options() else item.name


# --- checks ---------------------------------------------------------------------------------


def _version_problems(version: Any) -> list[Problem]:
    if isinstance(version, bool) or not isinstance(version, int):
        return []  # the type is wrong; pydantic says so
    if version > FORMAT_VERSION:
        reason = f"recipe format {version} is newer than this fxopt, which reads {FORMAT_VERSION}"
        return [Problem("fxopt", f"{reason}. Upgrade with `pip install -U fxopt`.")]
    if version < FORMAT_VERSION:
        return [Problem("fxopt", f"there is no recipe format {version}; write {FORMAT_VERSION}.")]
    return []


def pass_problems(passes: Any, expect: Any = None) -> list[Problem]:
    """What is wrong with the passes of a recipe: names, options, order, expectations."""
    if not isinstance(passes, list | tuple):
        return []  # pydantic names the place
    problems: list[Problem] = []
    if not passes:
        problems.append(Problem("passes", "the list is empty; name at least one pass."))
    built = _build_all(passes, problems)
    problems += order_problems(built)
    names = [item.name for item in built if item is not None]
    if isinstance(expect, Mapping) and None not in built:
        for name in expect:
            if name not in names:
                advice = nearest(str(name), names) or f"It has {', '.join(names)}."
                reason = f"the recipe has no pass called {name!r}. {advice}"
                problems.append(Problem(f"expect.{name}", reason))
    return problems


def _build_all(passes: Sequence[Any], problems: list[Problem]) -> list[Pass | None]:
    built: list[Pass | None] = []
    for index, entry in enumerate(passes):
        place = f"passes[{index}]"
        if not _well_formed(entry):
            reason = "a pass is a name, or one name with its options"
            problems.append(Problem(place, f"{reason}, found {entry!r}"[:200]))
            built.append(None)
            continue
        name, options = _name_and_options(entry)
        built.append(build_pass(name, options, place, problems))
    return built


def _well_formed(entry: Any) -> bool:
    if isinstance(entry, str):
        return True
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((name, options),) = entry.items()
    if not isinstance(name, str) or not isinstance(options, dict | None):
        return False
    return all(isinstance(key, str) for key in options or {})


def _name_and_options(entry: Entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    ((name, options),) = entry.items()
    return name, options or {}


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
