"""The first check of all: the captured graph against the model, run eagerly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import CaptureError
from fxopt.ir.program import Program

# Error over rms of the output. Fused attention reorders sums, so bit-equality is reported but
# not demanded; anything above this is a different function.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}


@dataclass(frozen=True)
class Comparison:
    """One run of graph and model on the same inputs."""

    description: str
    error: float
    bit_equal: bool


def run_graph(program: Program, inputs: list[Tensor], description: str) -> list[Tensor]:
    """What the captured graph gives where the model itself runs.

    Raises:
        CaptureError: the graph does not run there.
    """
    try:
        with torch.no_grad():
            return list(program.graph_module(*inputs))
    except Exception as error:
        raise CaptureError(
            f"capture check at {description}: the model runs and its graph fails with "
            f"{type(error).__name__}: {str(error)[:200]}. Python code of the model (a loop over "
            "the sequence, perhaps) was fixed to the example's sizes or values."
        ) from error


def compare_outputs(
    description: str, names: list[str], graph: list[Tensor], model: list[Tensor]
) -> Comparison:
    """Compare flat outputs, each against the dtype's own tolerance.

    Raises:
        CaptureError: count, shape, dtype or values differ; the message says which output.
    """
    refuse_other_count(description, graph, model)
    worst, equal = 0.0, True
    for name, ours, theirs in zip(names, graph, model, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise CaptureError(
                f"capture check at {description}: output {name!r} is {ours.dtype} "
                f"{list(ours.shape)} in the graph and {theirs.dtype} {list(theirs.shape)} in the "
                "model: a dimension was fixed at capture. Pass example_inputs of another size."
            )
        equal = equal and torch.equal(ours, theirs)
        error = relative_error(ours, theirs)
        limit = TOLERANCE.get(theirs.dtype, 0.0)
        if not error <= limit:
            raise CaptureError(
                f"capture check at {description}: output {name!r} differs from the model by "
                f"{error:.3g} of its rms (allowed {limit:g}): the graph is not the model. "
                "Control flow that depends on the inputs' sizes or values is the usual cause, or "
                "random numbers in forward."
            )
        worst = max(worst, error)
    return Comparison(description, worst, equal)


def refuse_other_count(description: str, graph: list[Tensor], model: list[Tensor]) -> None:
    """Check that graph and model return equally many tensors.

    Raises:
        CaptureError: they do not.
    """
    if len(graph) != len(model):
        raise CaptureError(
            f"capture check at {description}: the graph returns {len(graph)} tensors, the model "
            f"{len(model)}. Leave out flags (output_attentions, output_hidden_states) and forward "
            "hooks that change what it returns."
        )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Max |a - b| / rms(b); inf where only one is finite, 0 for empty tensors."""
    if theirs.numel() == 0:
        return 0.0
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    a, b = ours.double(), theirs.double()
    finite = torch.isfinite(b)
    same = finite.logical_and(torch.isfinite(a)) | (a == b) | (torch.isnan(a) & torch.isnan(b))
    if not bool(same.all()):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    rms = float(b.square().mean().sqrt())
    return float((a - b).abs().max()) / max(rms, 1e-30)
