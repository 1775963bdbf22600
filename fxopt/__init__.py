"""fxopt: a compiler-style transformer optimizer in which every rewrite is checked."""

from fxopt import passes
from fxopt.api import capture, diff, load, optimize, recipes
from fxopt.errors import FxoptError
from fxopt.ir.program import Program
from fxopt.pipeline.recipe import Recipe
from fxopt.runtime.optimized import OptimizedModel

__version__ = "0.1.0"

__all__ = [
    "FxoptError",
    "OptimizedModel",
    "Program",
    "Recipe",
    "__version__",
    "capture",
    "diff",
    "load",
    "optimize",
    "passes",
    "recipes",
]
