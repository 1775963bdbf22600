"""Refuse models and example inputs that nothing right could be done with."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxopt.errors import CaptureError, InputError, ModelError


def refuse_broken_model(model: object) -> None:
    """Check that `model` is a module whose weights are there and finite.

    Raises:
        ModelError: it is not a module, a weight is on the meta device, sparse, lazy, NaN or
            infinite.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"asked to optimize a {type(model).__name__}; fxopt takes an nn.Module or an HF model."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _refuse_form(name, tensor)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"weight {name!r} {list(parameter.shape)} is on the meta device: it has no values. "
                "Load the checkpoint before optimizing."
            )
        if not _all_finite(parameter):
            kind = "NaN" if _holds_nan(parameter) else "infinite"
            raise ModelError(
                f"weight {name!r} {list(parameter.shape)} {parameter.dtype} holds {kind} values. "
                "The checkpoint is damaged or training diverged; nothing was changed."
            )
    for name, buffer in model.named_buffers():  # infinity may be meant there: a mask, say
        if not buffer.is_meta and _holds_nan(buffer):
            raise ModelError(
                f"buffer {name!r} {list(buffer.shape)} {buffer.dtype} holds NaN values. "
                "The checkpoint is damaged or training diverged; nothing was changed."
            )


def refuse_scripted(model: nn.Module) -> None:
    """Check that a model is Python that can be traced.

    Raises:
        CaptureError: it is TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"asked to capture a {type(model).__name__}: TorchScript is compiled already, there is "
            "no Python in it to capture. Pass the module that it was made from."
        )


def refuse_nan_inputs(names: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """Check example inputs: where NaN goes in, NaN comes out, and every comparison is empty.

    Raises:
        InputError: an input holds NaN. Infinity may be meant: a mask, say.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if _holds_nan(tensor):
            raise InputError(
                f"example input {name!r} {list(tensor.shape)} holds NaN, so that nothing could be "
                "checked with it. Pass inputs like those the model will see."
            )


def _holds_nan(tensor: Tensor) -> bool:
    inexact = tensor.is_floating_point() or tensor.is_complex()
    # Numbers of 8 bits can be stored and converted, no more.
    wide = tensor.float() if inexact and tensor.element_size() == 1 else tensor
    return inexact and bool(torch.isnan(wide).any())


def _refuse_form(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ModelError(
            f"weight {name!r} has no shape yet: it belongs to a lazy module. Run the model once "
            "before optimizing."
        )
    if tensor.layout is not torch.strided:
        raise ModelError(
            f"weight {name!r} {list(tensor.shape)} is stored as {tensor.layout}; fxopt takes dense "
            "weights. Convert it with .to_dense() before optimizing."
        )


@torch.no_grad()
def _all_finite(parameter: torch.Tensor) -> bool:
    # min and max carry NaN and infinity through without a mask as large as the weight.
    if parameter.is_complex():
        parameter = torch.view_as_real(parameter.resolve_conj())
    if parameter.numel() == 0 or not parameter.is_floating_point():
        return True
    if parameter.element_size() == 1:
        parameter = parameter.float()  # numbers of 8 bits can be stored and converted, no more
    low, high = torch.aminmax(parameter)
    return bool(torch.isfinite(low) & torch.isfinite(high))
