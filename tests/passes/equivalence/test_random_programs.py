"""Every equivalence pass on random transformers: the function stays, what is reported is true.

Structures are captured once and their weights drawn anew, because a capture takes a second and a
pass a few milliseconds: weights are data, and the symmetries of a structure do not depend on them.
`FXOPT_RANDOM_STRUCTURES=400 pytest tests/passes/equivalence/test_random_programs.py` judges more.
"""

import os
import warnings

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt
from fxopt.analysis.samples import Sample
from fxopt.ir.program import PassRecord, Program
from fxopt.passes.base import Pass
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.equalize import Equalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from fxopt.passes.quantization.options import WeightOptions
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.tolerances import EQUIVALENT_FLOAT64
from fxopt.pipeline.verify import Verifier
from tests.random_transformers import Choice, build, choices, inputs

STRUCTURES = int(os.environ.get("FXOPT_RANDOM_STRUCTURES", "30"))
DRAWS = 11  # 330 programs
JUDGE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=STRUCTURES,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
CHAINS: dict[str, list[Pass]] = {
    "fold-norm": [FoldNorm()],
    "centre": [FoldNorm(centre=True)],
    "smoothquant": [SmoothQuant()],
    "awq-scale": [AwqScale(ratio=0.5)],
    "awq-scale auto": [AwqScale(weights=WeightOptions("int4"))],
    "equalize": [Equalize()],
    "permute-ffn": [PermuteFfn(by="random")],
    "permute-vo": [PermuteVo(by="random")],
    "permute-qk": [PermuteQk(by="random")],
    "permute-heads": [PermuteHeads(by="random")],
    "permute-residual": [PermuteResidual(by="random")],
    "restored": [PermuteResidual(by="random", restore_output=True)],
    "rotate": [Untie(), FoldNorm(centre=True), Rotate(keys=True)],
    "qk-then-heads": [PermuteQk(by="random"), PermuteHeads(by="random")],
}


def double(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def canonical(choice: Choice, seed: int) -> Program:
    program = fxopt.capture(build(choice, seed).double(), tuple(double(inputs(choice, seed, 2, 5))))
    return Manager(Verifier((), mode="off")).run(program, [Canonicalize()])


def redrawn(program: Program, choice: Choice, seed: int, first: int) -> Program:
    """The same structure with the weights of another seed."""
    twin = program.clone()
    old, new = (build(choice, s).double().state_dict() for s in (first, seed))
    for name, value in program.weights().items():
        if name in old and torch.equal(old[name], value):
            twin.set_weight(name, new[name])
    return twin


def outputs(program: Program, values: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(program.graph_module(*values))


def judge(program: Program, chain: list[Pass], examples: list[list[Tensor]]) -> list[PassRecord]:
    """Run passes one by one; each leaves the function and tells the truth about what it did."""
    runner = Manager(
        Verifier((), mode="off"), samples=lambda: [Sample(values) for values in examples]
    )
    reference = [outputs(program, values) for values in examples]
    for a_pass in chain:
        before = program.weights()
        held = {name: value.clone() for name, value in before.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = runner.apply(program, a_pass)
        assert all(torch.equal(held[name], value) for name, value in before.items())
        weights, record = after.weights(), after.history[-1]
        kept = weights.keys() == before.keys() and all(
            torch.equal(weights[name], before[name]) for name in before
        )
        assert kept == (not record.sites), f"{record.sites}"
        for values, expected in zip(examples, reference, strict=True):
            for ours, theirs in zip(outputs(after, values), expected, strict=True):
                assert bool(theirs.isfinite().all())
                error = (ours - theirs).abs().max() / theirs.square().mean().sqrt()
                assert float(error) <= EQUIVALENT_FLOAT64, f"{a_pass.name}: {record.sites}"
        program = after
    return program.history[-len(chain) :]


@settings(JUDGE)
@given(choice=choices(layers=1), seed=st.integers(0, 1000))
def test_every_pass_keeps_the_function(choice, seed):
    program = canonical(choice, seed)
    for draw in range(DRAWS):
        examples = [double(inputs(choice, seed + draw, *((2, 5), (1, 7))[draw % 2]))]
        drawn = redrawn(program, choice, seed + draw, seed)
        for chain in CHAINS.values():
            judge(drawn, chain, examples)
