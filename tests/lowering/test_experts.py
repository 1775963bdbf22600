"""Experts that are stored as codes reach a kernel that reads those that are chosen."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels import KERNELS
from fxopt.lowering import cuda
from fxopt.lowering.gate import SpeedGate
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.rewrite.driver import apply_rules
from tests.lowering.test_four_bit import VARIANTS
from tests.lowering.test_lower import TIMED, UNTIMED, check, kernels, lower, quantized

ops = torch.ops.fxopt
INT8 = {
    "channel": WeightOptions(),
    "tensor": WeightOptions(granularity="tensor"),
    "rows": WeightOptions(granularity="block", block_size=(8, -1)),
}


def experts_kernels(program) -> dict[str, int]:
    return {name: count for name, count in kernels(program).items() if "moe" in name}


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "granitemoe"])
@pytest.mark.parametrize("variant", INT8)
def test_int8_experts_have_their_kernel(name, variant):
    program = quantized(name, Quantize(INT8[variant]))
    count = len(program.nodes(ops.moe.default))
    lowered = lower(program, UNTIMED)
    assert experts_kernels(lowered.program) == {"moe_w8a16": count}
    assert not lowered.program.nodes(ops.moe.default)
    check(program, lowered)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_four_bit_variant_has_its_kernel(variant):
    program = quantized("mixtral", Quantize(VARIANTS[variant], exclude=("lm_head",)))
    lowered = lower(program, UNTIMED)
    assert experts_kernels(lowered.program) == {"moe_w4a16": 2}
    for node in lowered.program.nodes(KERNELS["moe_w4a16"].overload):
        for codes, zero in ((3, 5), (7, 9)):
            assert lowered.program.constant(node.args[codes]).dtype == torch.uint8
            assert (node.args[zero] is not None) == ("asymmetric" in variant)
    check(program, lowered)


def test_codes_of_experts_are_not_held_twice():
    program = quantized("mixtral", Quantize(VARIANTS["int4 group"]))
    lowered = lower(program, UNTIMED)
    assert lowered.program.byte_count() < 1.1 * program.byte_count()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (WeightOptions("int8", "group", 16), "the kernel takes one per output"),
        (WeightOptions("int8", symmetric=False), "the weight has zero points"),
        (WeightOptions("fp8_e4m3"), "the weight is not int8"),
    ],
)
def test_what_the_kernels_do_not_take_runs_in_floating_point_and_is_said(options, why):
    program = quantized("mixtral", Quantize(options))
    lowered = lower(program, UNTIMED)
    assert not experts_kernels(lowered.program)
    assert len(lowered.program.nodes(ops.moe.default)) == 2
    reasons = [refusal.reason for refusal in lowered.refusals if "experts" in refusal.site]
    assert len(reasons) == 2
    assert all(why in reason for reason in reasons)
    check(program, lowered)


def test_experts_are_timed_with_tokens_that_go_to_all_of_them(monkeypatch):
    seen: list[list[Tensor]] = []

    def taken(gate, examples, *rest):
        seen.extend(examples)
        return True

    monkeypatch.setattr(SpeedGate, "_faster", taken)
    program = quantized("mixtral", Quantize(include=("*.experts",)))
    lowered = lower(program, TIMED)
    assert experts_kernels(lowered.program) == {"moe_w8a16": 2}
    indices = [value for inputs in seen for value in inputs if value.dtype == torch.int64]
    assert len(indices) == len(TIMED.shapes)  # the layers are alike: one was timed
    for (batch, length), index in zip(TIMED.shapes, indices, strict=True):
        assert index.shape == (batch * length, 2)
        assert set(index.flatten().tolist()) == {0, 1, 2, 3}


def test_int8_experts_are_in_the_table_of_gpus():
    program = quantized("mixtral", Quantize(include=("*.experts",)))
    sites, refusals = apply_rules(program, cuda.INTEGER, "lower")
    assert {site.path for site in sites} == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert not refusals
