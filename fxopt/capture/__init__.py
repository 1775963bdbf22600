"""Turn a model into a Program, and check that the graph is the model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fxopt.capture.model_check import refuse_broken_model, refuse_nan_inputs, refuse_scripted
from fxopt.capture.module import capture_module, split_example
from fxopt.capture.pretrained import capture_pretrained
from fxopt.capture.tensors import keyword_tensors
from fxopt.errors import InputError
from fxopt.ir.program import Program

__all__ = ["capture_program"]


def capture_program(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a model as a graph of ATen and `fxopt::` operators.

    Args:
        model: an HF model or any nn.Module; it is left as it was.
        example_inputs: a tuple (positional) or dict (keywords). HF models need none.

    Raises:
        InputError: a plain module came without example inputs, or they do not fit it.
        ModelError: the model holds NaN, infinite or unmaterialized weights.
        CaptureError: the model cannot be captured, or its graph differs from it.
    """
    refuse_broken_model(model)
    refuse_scripted(model)
    if isinstance(model, PreTrainedModel):
        tensors = None
        if example_inputs is not None:
            args, kwargs = split_example(example_inputs)
            tensors = keyword_tensors(model, args, kwargs)
            refuse_nan_inputs(tensors, tensors.values())
        return capture_pretrained(model, tensors)
    if example_inputs is None:
        raise InputError(
            f"{type(model).__name__} is a plain module: fxopt cannot know what it takes. Pass "
            "example_inputs=(x, ...) for positional or example_inputs={...} for keyword inputs."
        )
    args, kwargs = split_example(example_inputs)
    return capture_module(model, args, kwargs)
