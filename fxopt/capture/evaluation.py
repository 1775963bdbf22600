"""Run a model as it runs at inference, and operator by operator."""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer

_DETECT = "_detect_is_causal_mask"


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Generator[None]:
    """Run a module as it runs at inference, operator by operator; its modes come back after."""
    # nn.TransformerEncoderLayer and nn.MultiheadAttention jump to one opaque fused operator in
    # eval mode, which no pass could look into.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modes = {child: child.training for child in module.modules()}
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        with _masks_taken_as_given():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in modes.items():
            child.training = mode


@contextlib.contextmanager
def _masks_taken_as_given() -> Generator[None]:
    """Keep nn.TransformerEncoder and its kin from comparing a mask with a causal one.

    They branch on the mask's values to choose a faster kernel for the same function.
    """
    detect = getattr(transformer, _DETECT, None)
    if detect is None:
        yield
        return

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        del mask, size
        return is_causal is True

    setattr(transformer, _DETECT, given)
    try:
        yield
    finally:
        setattr(transformer, _DETECT, detect)
