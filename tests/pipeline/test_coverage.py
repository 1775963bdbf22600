"""What calibration data did not show is said in the report, whichever pass reads it."""

import pytest
import torch

from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError
from fxopt.passes.base import Pass
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.quantization.allocate_bits import AllocateBits
from fxopt.passes.quantization.budget import Budget
from fxopt.passes.quantization.llm_int8 import LlmInt8
from fxopt.passes.quantization.mixed_precision import MixedPrecision
from fxopt.passes.quantization.options import ActivationOptions, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import as_sample, bert_batch, manager

STATIC = ActivationOptions(granularity="tensor")
READERS: list[Pass] = [
    Quantize(activations=STATIC),
    Quantize(weights=WeightOptions("int4", range="output")),
    AwqScale(),
    SmoothQuant(),
    LlmInt8(),
]
NAMES = ["static", "output range", "awq-scale", "smoothquant", "llm-int8"]


def notes(a_pass: Pass, samples: list[Sample]) -> str:
    program = manager(samples).run(canonical_program("bert"), [a_pass])
    return "; ".join(program.history[-1].notes)


@pytest.mark.parametrize("a_pass", READERS, ids=NAMES)
def test_too_few_tokens_are_reported(a_pass):
    program = canonical_program("bert")
    few = notes(a_pass, [as_sample(program, bert_batch(1, 4, 0))])
    assert "fewer real tokens than channels" in few
    many = notes(a_pass, [as_sample(program, bert_batch(20, 9, seed)) for seed in (0, 1)])
    assert "fewer real tokens" not in many


@pytest.mark.parametrize("a_pass", READERS[1:], ids=NAMES[1:])
def test_inputs_that_were_always_zero_are_named(a_pass):
    """A static range refuses them: there is none (tested with `quantize`)."""
    program = canonical_program("bert")
    silent = next(node.args[1].target for node in program.nodes(torch.ops.aten.linear.default))
    samples = [as_sample(program, bert_batch(8, 16, 0))]
    assert "nothing but zeros" not in notes(a_pass, samples)
    for name in program.weights():
        if "LayerNorm" in name and "embeddings" in name:
            program.set_weight(name, torch.zeros_like(program.weight(name)))
    found = manager(samples).run(program, [a_pass])
    assert "nothing but zeros" in "; ".join(found.history[-1].notes)
    assert str(silent).rpartition(".")[0] in "; ".join(found.history[-1].notes)


@pytest.mark.parametrize(
    "a_pass", [AllocateBits(Budget(bits=6)), MixedPrecision()], ids=["allocate", "mixed"]
)
def test_passes_that_judge_outputs_refuse_what_they_cannot_judge(a_pass):
    program = canonical_program("bert")
    good = as_sample(program, bert_batch(3, 9, 0))
    if isinstance(a_pass, MixedPrecision):
        program = manager([good]).run(program, [Quantize(activations=STATIC)])
    judged = manager([good]).run(program, [a_pass])
    assert good.tokens is not None
    assert f"{int(good.tokens.sum())} real tokens" in "; ".join(judged.history[-1].notes)
    nobody = Sample(good.inputs, torch.zeros_like(good.tokens))
    with pytest.raises(CalibrationError, match="no token of it is real"):
        manager([nobody]).run(program, [a_pass])
    broken = program.clone()
    norms = [name for name in broken.weights() if "LayerNorm" in name]
    broken.set_weight(norms[-1], torch.full_like(broken.weight(norms[-1]), float("nan")))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        manager([good]).run(broken, [a_pass])
