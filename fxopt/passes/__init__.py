"""Passes: one per file, a folder per family. Calling the package lists them.

`fxopt.passes` is both where passes live and, called, the answer to "what is there?".
"""

import importlib
import pkgutil
import sys
from types import ModuleType


class _Passes(ModuleType):
    def __call__(self) -> dict[str, str]:
        """Every registered pass with its one-line summary."""
        for found in pkgutil.walk_packages(self.__path__, "fxopt.passes."):
            importlib.import_module(found.name)
        from fxopt.passes.base import registered_passes

        return {name: cls.summary() for name, cls in registered_passes().items()}


sys.modules[__name__].__class__ = _Passes
