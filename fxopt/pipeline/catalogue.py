"""What there is: passes and recipes by name, with one line each."""

from fxopt.pipeline.options import known_passes
from fxopt.pipeline.recipe import presets


def passes() -> dict[str, str]:
    """Every pass by name, with the first line of its docstring."""
    return {name: cls.summary() for name, cls in known_passes().items()}


def recipes() -> dict[str, str]:
    """Every preset by name, with its description."""
    return {name: recipe.description for name, recipe in presets().items()}
