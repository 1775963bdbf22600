"""Refuse a model that no optimizer could do anything right with."""

import torch
from torch import nn

from fxopt.errors import ModelError


def refuse_broken_model(model: object) -> None:
    """Check that `model` is a module whose weights are there and finite.

    Raises:
        ModelError: it is not a module, a weight is on the meta device, NaN or infinite.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"asked to optimize a {type(model).__name__}; fxopt takes an nn.Module or an HF model."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"weight {name!r} {list(parameter.shape)} is on the meta device: it has no values. "
                "Load the checkpoint before optimizing."
            )
        if parameter.is_floating_point() and not _all_finite(parameter):
            kind = "NaN" if bool(torch.isnan(parameter).any()) else "infinite"
            raise ModelError(
                f"weight {name!r} {list(parameter.shape)} {parameter.dtype} holds {kind} values. "
                "The checkpoint is damaged or training diverged; nothing was changed."
            )


@torch.no_grad()
def _all_finite(parameter: torch.Tensor) -> bool:
    # min and max carry NaN and infinity through without a mask as large as the weight.
    if parameter.numel() == 0:
        return True
    low, high = torch.aminmax(parameter)
    return bool(torch.isfinite(low) & torch.isfinite(high))
