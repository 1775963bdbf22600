"""Check what a pass did: equivalence in float64, or the decibels it cost."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.analysis.execution import promote, run, run_float64
from fxopt.analysis.promotion import promote_program
from fxopt.errors import NotEquivalentError, QualityFloorError
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Program, Site
from fxopt.passes.base import Exactness, Pass, PassResult
from fxopt.pipeline.attribution import first_divergence, guilty_site
from fxopt.pipeline.measure import (
    Inputs,
    Measurement,
    layer_decibels,
    max_error,
    measure,
    real_parts,
    rms_error,
)
from fxopt.pipeline.past import reading_on
from fxopt.pipeline.state_basis import StateBasis, fitted
from fxopt.pipeline.tolerances import (
    EDITS_IN_MEMORY,
    EQUIVALENT_FLOAT64,
    NOISE_FLOOR,
    NOISE_SLACK,
    ROUNDING_SLACK,
)

# Runs the pass once more, on another program.
Repeat = Callable[[Program], tuple[Program, PassResult]]


@dataclass(frozen=True)
class Floor:
    """What a lossy pass may cost at most; None means no limit."""

    sqnr_db: float | None = None
    top1: float | None = None
    kl: float | None = None

    def applies_to(self, measured: Measurement) -> bool:
        """Whether anything that it limits was there to be measured; True if it limits nothing."""
        limits = [self.sqnr_db, self.top1, self.kl]
        found = [measured.floating, measured.top1 is not None, measured.kl is not None]
        asked = [there for limit, there in zip(limits, found, strict=True) if limit is not None]
        return any(asked) or not asked


@dataclass(frozen=True)
class Verifier:
    """Judges passes on a fixed set of inputs.

    Attributes:
        inputs: flat inputs on which programs are compared.
        natural: inputs made from real text, where there is a tokenizer. Lossy passes are
            measured on these: on random tokens a language model is not itself.
        mode: "full", "fast" (one input set, the model's own dtype) or "off".
        floor: the recipe's floor for lossy passes.
    """

    inputs: Sequence[Inputs]
    mode: str = "full"
    floor: Floor = Floor()
    natural: Sequence[Inputs] = ()

    def judge(
        self,
        a_pass: Pass,
        before: Program,
        after: Program,
        result: PassResult,
        repeat: Repeat,
    ) -> dict[str, Any]:
        """Compare a program before and after a pass; `repeat` runs the pass on another program.

        Returns:
            what was measured, for the report.

        Raises:
            NotEquivalentError: an EQUIVALENT pass changed the function.
            QualityFloorError: an APPROXIMATE pass cost more than the floor.
        """
        if self.mode == "off" or unchanged(before, after):
            return {"mode": "off" if self.mode == "off" else "nothing changed"}
        judge = self.fitted_to(before)
        if a_pass.exactness is Exactness.APPROXIMATE:
            return judge._judge_approximate(a_pass, before, after, result)
        return judge._judge_equivalent(a_pass, before, after, result, repeat)

    def fitted_to(self, program: Program) -> "Verifier":
        """The same, with inputs whose caches a program takes: passes may have made them smaller."""
        inputs = [fitted(program, values) for values in self.inputs]
        natural = [fitted(program, values) for values in self.natural]
        return dataclasses.replace(self, inputs=inputs, natural=natural)

    # --- equivalent -------------------------------------------------------------------------

    def _judge_equivalent(
        self,
        a_pass: Pass,
        before: Program,
        after: Program,
        result: PassResult,
        repeat: Repeat,
    ) -> dict[str, Any]:
        chosen = self.inputs if self.mode == "full" else self.inputs[:1]
        case = _Case(a_pass, before, after, result)
        rounding = _Rounding(case, chosen)
        measured: dict[str, Any] = {"mode": self.mode, "inputs": len(chosen)}
        if self.mode == "full":
            exact = _float64_case(case, repeat)
            errors = [self._float64(exact, inputs, rounding) for inputs in chosen]
            measured["error_float64"] = max(errors)
        errors = [self._own_dtype(case, inputs, rounding) for inputs in chosen]
        measured["error_own_dtype"] = max(errors)
        return measured

    def _float64(self, case: "_Case", inputs: Inputs, rounding: "_Rounding") -> float:
        reference = run_float64(case.before, inputs)
        outputs = run_float64(case.after, case.state.inputs([promote(value) for value in inputs]))
        reference = case.state.outputs(reference)
        worst = 0.0
        for index, pair in enumerate(zip(outputs, reference, strict=True)):
            error = max_error(*pair)
            if not error <= EQUIVALENT_FLOAT64:
                if rounding.explains(index, *pair):
                    continue
                allowed = f"{EQUIVALENT_FLOAT64:g}"
                raise _not_equivalent(case, inputs, index, error, allowed, "float64")
            worst = max(worst, error)
        return worst

    def _own_dtype(self, case: "_Case", inputs: Inputs, rounding: "_Rounding") -> float:
        reference = case.state.outputs(run_float64(case.before, inputs))
        old = case.state.outputs(run(case.before, inputs))
        new = run(case.after, case.state.inputs(inputs))
        worst = 0.0
        for index, (a, b, exact) in enumerate(zip(old, new, reference, strict=True)):
            if not (a.is_floating_point() or a.is_complex()):
                if self.mode == "full":
                    continue  # in float64 they were equal; here a tie may fall to the other side
                noise, noise_after = 0.0, max_error(torch.where(b == exact, a, b), a)
            else:
                noise, noise_after = (rms_error(promote(value), exact) for value in (a, b))
            floor = NOISE_FLOOR.get(real_parts(a).dtype, 0.0)
            if not noise_after <= NOISE_SLACK * max(noise, floor):
                if rounding.explains(index, b, exact):
                    continue
                limit = "the original's own noise"
                raise _not_equivalent(case, inputs, index, noise_after, limit, str(a.dtype)[6:])
            worst = max(worst, noise_after)
        return worst

    # --- approximate ------------------------------------------------------------------------

    def _judge_approximate(
        self, a_pass: Pass, before: Program, after: Program, result: PassResult
    ) -> dict[str, Any]:
        chosen = self.natural or self.inputs
        chosen = chosen if self.mode == "full" else chosen[:1]
        if result.past:
            chosen = reading_on(before, chosen, result.past)
        basis = StateBasis(before, result)
        measured = measure(before, after, chosen, basis.inputs)
        release_freed_memory(before.byte_count())  # every weight was there once in floating point
        layers = layer_decibels(before, after, (chosen[0], basis.inputs(chosen[0])), result)
        problems: list[str] = []
        if measured.reshaped:
            problems.append(
                f"values decide on the shape of an output, which went {measured.reshaped}"
            )
        elif not measured.sqnr_db > -torch.inf:
            problems.append("NaN or infinite values where there were none")
        floor = self.floor
        if not floor.applies_to(measured):
            problems.append("no output can be measured as the floor asks, so it would hold nothing")
        if floor.sqnr_db is not None and not measured.sqnr_db >= floor.sqnr_db:
            problems.append(f"SQNR {measured.sqnr_db:.1f} dB (floor {floor.sqnr_db:g} dB)")
        if floor.top1 is not None and measured.top1 is not None and not measured.top1 >= floor.top1:
            problems.append(f"top-1 agreement {measured.top1:.3f} (floor {floor.top1:g})")
        if floor.kl is not None and measured.kl is not None and not measured.kl <= floor.kl:
            problems.append(f"KL {measured.kl:.3g} (at most {floor.kl:g})")
        if problems:
            where = f" at output {measured.worst_output!r}" if measured.worst_output else ""
            raise QualityFloorError(
                f"pass {a_pass.name!r} cost more than the recipe allows{where}: "
                f"{'; '.join(problems)}. Exclude sensitive layers, use "
                "finer granularity, or lower the floor. The program is as it was before the pass."
            )
        return {"mode": self.mode, "inputs": len(chosen)} | measured.to_dict() | {"layers": layers}


@dataclass(frozen=True)
class _Case:
    """One pass and the programs around it."""

    a_pass: Pass
    before: Program
    after: Program
    result: PassResult

    @property
    def state(self) -> StateBasis:
        """How the caches of both programs correspond."""
        return StateBasis(self.before, self.result)


def _float64_case(case: _Case, repeat: Repeat) -> _Case:
    """The case to judge in float64.

    A pass that edits floating weights rounds them to the model's dtype. It is repeated on a
    float64 twin, where nothing rounds. Of the twin only the edits are stored in float64, on disk
    beyond a limit, so that a model of any size is held to the same number.
    """
    before, after = case.before.weights(), case.after.weights()
    edited = any(
        value.is_floating_point()
        and value.dtype != torch.float64
        and (name not in before or before[name].data_ptr() != value.data_ptr())
        and not _same_values(value, before.get(name))
        for name, value in after.items()
    )
    if not edited:
        return case
    twin = promote_program(case.before, EDITS_IN_MEMORY)
    default = torch.get_default_dtype()
    # What a program computes from integers alone has the default dtype; the twin's is float64.
    torch.set_default_dtype(torch.float64)
    try:
        after_twin, result = repeat(twin)
    finally:
        torch.set_default_dtype(default)
    # The sites are those of the pass itself; a cache follows the factors chosen on the twin.
    exact = dataclasses.replace(case.result, state=result.state)
    return dataclasses.replace(case, before=twin, after=after_twin, result=exact)


def _same_values(value: Tensor, other: Tensor | None) -> bool:
    """Equal, or equal when transposed: a change of layout rounds nothing."""
    if other is None or other.dtype != value.dtype:
        return False
    if other.shape == value.shape and torch.equal(other, value):
        return True
    return other.dim() == 2 and other.t().shape == value.shape and torch.equal(other.t(), value)


@dataclass(frozen=True)
class _Rounding:
    """What a model rounds at its outputs in its own dtype, looked at only where a check fails."""

    case: _Case
    chosen: Sequence[Inputs]

    def explains(self, index: int, output: Tensor, reference: Tensor) -> bool:
        """Whether an output is nothing but rounding, and differs by no more than that."""
        if output.shape != reference.shape or not real_parts(reference).is_floating_point():
            return False
        units: list[float] = []  # rounding in units of its dtype: that of a zero differs by luck
        for inputs in self.chosen:
            own = self.case.state.outputs(run(self.case.before, inputs))[index]
            exact = self.case.state.outputs(run_float64(self.case.before, inputs))[index]
            noise = rms_error(promote(own), exact)
            if bool(own.any()) and not 1 <= noise < torch.inf:
                return False
            units.append(_rms(promote(own) - exact) / torch.finfo(own.dtype).eps)
        unit = torch.finfo(output.dtype).eps
        return _rms(promote(output) - reference) <= ROUNDING_SLACK * unit * max(units)


def _rms(value: Tensor) -> float:
    return float(real_parts(value).square().mean().sqrt())


def _not_equivalent(
    case: _Case, inputs: Inputs, output: int, error: float, allowed: str, dtype: str
) -> NotEquivalentError:
    moved = case.state.inputs([promote(value) for value in inputs])
    found = first_divergence(case.before, case.after, inputs, moved, output)
    site = guilty_site(found, case.result, case.after)
    name = case.before.signature.outputs[output].name
    shapes = [list(tensor.shape) for tensor in inputs[:2]]
    return NotEquivalentError(
        f"pass {case.a_pass.name!r} promised an equivalent program and changed output {name!r} by "
        f"{error:.3g} of its rms in {dtype} (allowed {allowed}; inputs of shape {shapes}). "
        f"{_describe_site(site)} {found} The program is as it was before the pass."
    )


def unchanged(before: Program, after: Program) -> bool:
    """Whether two programs are the same graph over the same tensors."""

    def outline(program: Program) -> list[tuple[str, ...]]:
        nodes = program.graph.nodes
        return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in nodes]

    mine, theirs = before.weights(), after.weights()
    same_tensors = mine.keys() == theirs.keys() and all(
        mine[name].data_ptr() == theirs[name].data_ptr() for name in mine
    )
    return same_tensors and outline(before) == outline(after)


def _describe_site(site: Site | None) -> str:
    if site is None:
        return "No single site could be named."
    return f"Guilty site: {site.path or '(model)'} ({site.detail})."
