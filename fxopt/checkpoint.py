"""Find a model by what a user types: a folder, a name on the hub, a GGUF file, a saved folder."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fxopt.api import capture
from fxopt.errors import ModelError
from fxopt.ir.program import Program
from fxopt.runtime.folder import read_folder
from fxopt.runtime.stored_files import MANIFEST

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def is_saved(place: str) -> bool:
    """Whether a place is a folder that fxopt wrote."""
    return (Path(place) / MANIFEST).is_file()


def load_model(place: str) -> Any:
    """Load an HF model for inference; code that comes with a checkpoint is never run.

    Raises:
        ModelError: there is no such model, or transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()
    path = Path(place)
    try:
        if path.suffix == ".gguf":
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        else:
            model = _model_class(place).from_pretrained(place)
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"{place!r} could not be loaded as a transformers model: {_first_line(error)} Give a "
            "folder with config.json and weights, the name of a model on the hub, or a .gguf file."
        ) from error
    return model.eval()


def load_program(place: str) -> Program:
    """The program of a saved folder, or of a model captured now."""
    return read_folder(place).program if is_saved(place) else capture(load_model(place))


def _model_class(place: str) -> Any:
    """The class that the checkpoint was saved from, so that its head is kept."""
    config = AutoConfig.from_pretrained(place)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return AutoModel


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.')[:300]}."
