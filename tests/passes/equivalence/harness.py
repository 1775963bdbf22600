"""Run passes on tiny models, verified in float64, and look at what they changed."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program
from fxopt.passes.base import Pass
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.pipeline.data import keyword_inputs
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.tolerances import EQUIVALENT_FLOAT64
from fxopt.pipeline.verify import Verifier
from tests.models import canonical_program, randomize, zoo_model
from tests.zoo import GROUPED, hf

TIED: dict[str, Callable[[], nn.Module]] = {
    "tied-llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
}


@cache
def _tied(name: str) -> Program:
    torch.manual_seed(0)
    model = TIED[name]().eval()
    randomize(model)
    program = fxopt.capture(model)
    return Manager(Verifier((), mode="off")).run(program, [Canonicalize()])


def canonical(name: str) -> Program:
    return _tied(name).clone() if name in TIED else canonical_program(name)


def plain(module: nn.Module, *inputs: Tensor) -> Program:
    """A module written by hand, canonical."""
    program = fxopt.capture(module.eval().requires_grad_(False), inputs)
    return Manager(Verifier((), mode="off")).run(program, [Canonicalize()])


def calibration_of(program: Program) -> Sequence[Sample]:
    """What `run` calibrates with: batches as a recipe makes them, with no tokens before theirs."""
    if program.signature.cache is None:
        return [Sample(values) for values in program.examples[:2]]
    names = [spec.name for spec in program.signature.inputs]
    read = [name for name in names if name in ("input_ids", "decoder_input_ids")]
    batches = [dict(zip(names, values, strict=True)) for values in program.examples[:2]]
    entries = [{name: batch[name] for name in read} for batch in batches]
    return [Sample(keyword_inputs(program.signature, entry)) for entry in entries]


def run(program: Program, *passes: Pass) -> Program:
    """The program after some passes, each judged in float64 to 1e-9."""
    examples, samples = program.examples[:2], calibration_of(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        after = Manager(Verifier(examples), samples=lambda: samples).run(program, passes)
    for record in after.history[-len(passes) :]:
        error = record.verification.get("error_float64", 0.0)
        assert error <= EQUIVALENT_FLOAT64
        assert ("error_float64" in record.verification) == bool(record.sites), record.name
    return after


def changed(before: Program, after: Program) -> set[str]:
    """The weights that are new or have other values."""
    old, new = before.weights(), after.weights()
    return {n for n, v in new.items() if n not in old or not torch.equal(old[n], v)}


def sites(program: Program) -> list[str]:
    return [site.path for site in program.history[-1].sites]


def details(program: Program) -> list[str]:
    """What was done at each site."""
    return [site.detail for site in program.history[-1].sites]


def refusals(program: Program) -> str:
    """All reasons as one text."""
    return "\n".join(f"{r.site}: {r.reason}" for r in program.history[-1].refusals)


def ends(names: set[str], *leaves: str) -> set[str]:
    """Names of weights without their layers."""
    return {leaf for name in names for leaf in leaves if name.endswith(leaf)}


def idempotent(after: Program, a_pass: Any) -> None:
    """A second run changes nothing."""
    again = run(after, a_pass)
    assert changed(after, again) == set()
    assert again.history[-1].sites == ()


__all__ = [
    "canonical",
    "changed",
    "details",
    "ends",
    "idempotent",
    "plain",
    "refusals",
    "run",
    "sites",
    "zoo_model",
]
