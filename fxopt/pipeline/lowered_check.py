"""Check a lowered program: each kernel against its reference, then the whole against the graph."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from fxopt.analysis.execution import promote
from fxopt.errors import LoweringError
from fxopt.ir.program import Program, module_path
from fxopt.kernels import KERNELS
from fxopt.lowering import Lowered
from fxopt.pipeline.measure import measure, rms_error
from fxopt.pipeline.tolerances import KERNEL_SQNR_DB, LOWERED_SLACK_DB, LOWERED_SQNR_DB
from fxopt.pipeline.verify import Verifier


class _KernelCheck(Interpreter):
    """Runs a lowered program and, at each kernel, its reference on the same operands."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.references = {kernel.overload: kernel.reference for kernel in KERNELS.values()}
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        reference = self.references.get(target)
        if reference is not None and self.node is not None:
            _compare(self.node, result, reference(*args, **kwargs))
        return result


def _compare(node: Node, result: Any, expected: Any) -> None:
    if isinstance(result, tuple | list):
        for a, b in zip(result, expected, strict=True):
            _compare(node, a, b)
        return
    if not isinstance(result, Tensor) or not result.is_floating_point() or not result.numel():
        return
    decibels = _decibels(rms_error(promote(result), promote(expected)))
    if not decibels >= KERNEL_SQNR_DB[result.dtype]:
        raise LoweringError(
            f"kernel {node.target} at {module_path(node) or node.name} differs from its reference "
            f"on the same operands: SQNR {decibels:.1f} dB, at least "
            f"{KERNEL_SQNR_DB[result.dtype]:g} dB allowed. It computes something else on this "
            "machine; use target='reference' and report it with your processor's model."
        )


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -20 * math.log10(error)


def check_lowered(program: Program, lowered: Lowered, verifier: Verifier) -> dict[str, Any]:
    """Compare a lowered program with the one it came from.

    A kernel rounds to integers after sums in another order, so that a value now and then falls
    to the other side of a step; deep models amplify one such step up to the noise of quantization
    itself. Kernels are therefore held to their references one by one, and the whole to the noise
    that quantization was measured to make.

    Raises:
        LoweringError: a kernel or the whole differs by more; the message names the site.
    """
    if verifier.mode == "off" or not lowered.sites:
        return {}
    verifier = verifier.fitted_to(program)
    chosen: Sequence[Any] = verifier.inputs if verifier.mode == "full" else verifier.inputs[:1]
    with torch.no_grad():
        for inputs in chosen[:2]:
            _KernelCheck(lowered.program).run(*inputs)
    whole = verifier.natural or chosen
    measured = measure(lowered.oracle(program), lowered.program, whole)
    allowed = _allowed_decibels(program)
    if not measured.sqnr_db >= allowed:
        raise LoweringError(
            f"lowering to {lowered.target!r} changed output {measured.worst_output!r}: SQNR "
            f"{measured.sqnr_db:.1f} dB against the graph it came from, at least {allowed:.1f} dB "
            "allowed. Use target='reference' and report it with your processor's model."
        )
    return measured.to_dict()


def _allowed_decibels(program: Program) -> float:
    losses = [record.verification.get("sqnr_db") for record in program.history]
    known = [float(loss) for loss in losses if loss is not None]
    return min([LOWERED_SQNR_DB, *(loss - LOWERED_SLACK_DB for loss in known)])
