"""Weights of at most four bits reach their kernel; what it does not take says why."""

import pytest
import torch

from fxopt.kernels import KERNELS
from fxopt.lowering.four_bit import read_codes
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from tests.lowering.test_lower import UNTIMED, check, kernels, lower, quantized

aten = torch.ops.aten
ops = torch.ops.fxopt
GROUP = {"granularity": "group", "group_size": 16}
VARIANTS = {
    "int4 channel": WeightOptions("int4"),
    "int4 group": WeightOptions("int4", **GROUP),
    "int4 asymmetric": WeightOptions("int4", symmetric=False, **GROUP),
    "int4 tensor": WeightOptions("int4", "tensor"),
    "int4 block": WeightOptions("int4", "block", block_size=(8, 16)),
    "int3 group": WeightOptions("int3", **GROUP),
    "int2 asymmetric": WeightOptions("int2", symmetric=False, **GROUP),
    "nf4 group": WeightOptions("nf4", **GROUP),
}


# The llama's head has 99 outputs, which no block of rows divides.
CASES = [(name, variant) for name in ("llama", "bert") for variant in VARIANTS]
CASES.remove(("llama", "int4 block"))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_each_variant_has_its_kernel(name, variant):
    program = quantized(name, Quantize(VARIANTS[variant]))
    lowered = lower(program, UNTIMED)
    linears = {name: count for name, count in kernels(lowered.program).items() if "linear" in name}
    assert set(linears) == {"linear_w4a16"}
    assert not lowered.program.nodes(
        aten.linear.default, ops.unpack.default, ops.dequantize.default
    )
    for node in lowered.program.nodes(KERNELS["linear_w4a16"].overload):
        codes = lowered.program.constant(node.args[1])
        assert codes.dtype == torch.uint8
        assert (node.args[3] is not None) == ("asymmetric" in variant)
    check(program, lowered)


def test_siblings_are_merged_and_activations_become_epilogues():
    lowered = lower(quantized("bert", Quantize(VARIANTS["int4 group"])), UNTIMED)
    nodes = lowered.program.nodes(KERNELS["linear_w4a16"].overload)
    assert len(nodes) == 9  # q, k and v of two layers are one each
    assert sum("gelu" in node.args for node in nodes) == 2
    tables = {node.args[6] for node in nodes}
    assert len(tables) == 1


def test_four_bits_are_not_stored_twice():
    program = quantized("bert", Quantize(VARIANTS["int4 group"]))
    lowered = lower(program, UNTIMED)
    floating = [
        value
        for name, value in lowered.program.weights().items()
        if value.is_floating_point() and "_floating" in name
    ]
    assert not floating
    assert lowered.program.byte_count() < 1.1 * program.byte_count()


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_other_formats_are_not_taken_for_it(dtype):
    program = quantized("llama", Quantize(WeightOptions(dtype, **GROUP)))
    for node in program.nodes(aten.linear.default):
        assert read_codes(node.args[1]) is None
    lowered = lower(program, UNTIMED)
    assert "linear_w4a16" not in kernels(lowered.program)
    check(program, lowered)


def test_a_rounded_activation_keeps_its_linear():
    from fxopt.passes.quantization.options import ActivationOptions

    program = quantized("llama", Quantize(WeightOptions("int4"), ActivationOptions("int4")))
    lowered = lower(program, UNTIMED)
    assert "linear_w4a16" not in kernels(lowered.program)
