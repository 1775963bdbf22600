"""Norms that quantize for the linear that reads them: where, what they return, and when not."""

import operator

import pytest
import torch
from torch import nn

from fxopt.ir.program import Program
from fxopt.lowering import LoweringOptions, gate, lower
from fxopt.passes.quantization.quantize import Quantize
from fxopt.rewrite.pattern import argument
from tests.graphs import signature_of
from tests.lowering.test_lower import (
    COUNTS,
    TOKEN,
    UNTIMED,
    apply,
    check,
    kernels,
    quantized,
    refuse_to_time,
    run,
    scaled,
    small,
    timed,
)

aten = torch.ops.aten
ops = torch.ops.fxopt


class Block(nn.Module):
    """norm(x [+ f(x)]) -> linear, whose sum and norm others may read."""

    def __init__(self, norm: str, *, added: bool, sum_read: bool = False, norm_read: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(16) if norm == "layer" else nn.RMSNorm(16, eps=1e-6)
        self.linear = nn.Linear(16, 16)
        self.added, self.sum_read, self.norm_read = added, sum_read, norm_read

    def forward(self, x):
        total = x + torch.tanh(x) if self.added else torch.tanh(x)
        y = self.norm(total)
        out = torch.sigmoid(self.linear(y))
        out = out + total if self.sum_read else out
        return out * y if self.norm_read else out


def block(norm: str, dtype: torch.dtype = torch.float32, **options: bool) -> Program:
    x = torch.randn(2, 3, 16).to(dtype)
    return apply(small(Block(norm, **options).to(dtype), x), Quantize(activations=TOKEN))


def decided(monkeypatch, program: Program, *, fused: bool) -> LoweringOptions:
    """Every kernel, with or without norms that quantize."""
    made, _ = timed(monkeypatch, program.clone(), (10.0, 5.0))
    keys = [key for key in made.decisions if key.startswith("QuantizeInNorm")]
    assert keys
    monkeypatch.setattr(gate, "alternate", refuse_to_time)
    return LoweringOptions(target="cpu", decisions={**made.decisions, **dict.fromkeys(keys, fused)})


@pytest.mark.parametrize("norm_read", [False, True])
@pytest.mark.parametrize("sum_read", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_gives_its_linear_codes_and_others_what_they_read(
    monkeypatch, norm, added, sum_read, norm_read
):
    program = block(norm, added=added, sum_read=sum_read, norm_read=norm_read)
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"norm_quantize": 1, "linear_w8a8": 1}
    (node,) = lowered.program.nodes(ops.norm_quantize.default)
    assert argument(node, "norm") == norm
    assert (argument(node, "residual") is not None) == added
    # A sum is a part of the operator only where it is computed for it.
    assert argument(node, "keep_total") == (added and sum_read)
    assert argument(node, "keep_norm") == norm_read
    assert not lowered.program.nodes(aten.layer_norm.default, aten.rms_norm.default)
    (site,) = (site for site in lowered.sites if site.detail == "QuantizeInNorm")
    assert site.path == "linear"
    check(program, lowered)
    text = signature_of(lowered.program)
    assert signature_of(lower(program, UNTIMED).program) == text
    apart = lower(program, decided(monkeypatch, program, fused=False))
    assert "norm_quantize" not in kernels(apart.program)
    assert kernels(apart.program)["dynamic_linear_w8a8"] == 1
    # Where it lost with the sum as a part, it is tried without; `add_layer_norm` keeps its sum.
    again = added and (norm == "rms" or sum_read)
    undecided = "nothing was decided on it when the model was saved"
    left = undecided if again else "slower than what it replaces"
    assert left in {r.reason for r in apart.refusals}


@pytest.mark.parametrize("name", COUNTS)
def test_it_changes_no_bit_of_a_model_without_plain_layer_norms(monkeypatch, name):
    """A float32 model computes the same with and without the fusion."""
    program = quantized(name)
    options = [decided(monkeypatch, program, fused=fused) for fused in (True, False)]
    parts = [lower(program.clone(), option) for option in options]
    assert [("norm_quantize" in kernels(part.program)) for part in parts] == [True, False]
    for inputs in program.examples:
        outputs = [run(part.program, inputs) for part in parts]
        for a, b in zip(*outputs, strict=True):
            if name == "gpt2":  # its norms were torch's, whose sums run in another order
                assert torch.allclose(a, b, rtol=2e-2, atol=2e-2)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_bf16_stays_bf16(norm):
    program = block(norm, torch.bfloat16, added=True, sum_read=True, norm_read=True)
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"norm_quantize": 1, "linear_w8a8": 1}
    assert run(lowered.program, program.examples[0])[0].dtype == torch.bfloat16
    check(program, lowered)


def test_a_sum_that_broadcasts_is_left_as_an_operand():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.norm(x + torch.tanh(x[:, :1])))

    program = apply(small(Broadcast(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    (node,) = lowered.program.nodes(ops.norm_quantize.default)
    assert argument(node, "residual") is None
    assert lowered.program.nodes(aten.add.Tensor)
    check(program, lowered)


def test_norms_over_several_axes_keep_apart():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm((3, 16)), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.norm(x))

    program = apply(small(Wide(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"dynamic_linear_w8a8": 1}
    assert "normalized over 2 axes" in {r.reason for r in lowered.refusals}
    check(program, lowered)


def test_what_is_timed_returns_what_others_read(monkeypatch):
    """The gate compares the norm and the linear, and counts what else must be written."""
    lengths: list[int] = []

    def watch(before, after):
        with torch.no_grad():
            a, b = before(), after()
        lengths.append(len(a))
        assert len(a) == len(b)
        return 10.0, 5.0

    monkeypatch.setattr(gate, "alternate", watch)
    program = block("rms", added=True, sum_read=True, norm_read=True)
    lower(program, LoweringOptions(target="cpu", shapes=[(2, 4)]))
    assert lengths[-1] == 3
    assert max(lengths[:-1]) == 1


def test_it_must_be_faster(monkeypatch):
    """Its values are those of its parts, so that a tie is no reason."""
    program = block("rms", added=False)
    made, _ = timed(monkeypatch, program.clone(), (10.0, 10.1))
    fusions = {key.partition(":")[0]: taken for key, taken in made.decisions.items()}
    assert fusions["DynamicLinear"] is True
    assert fusions["QuantizeInNorm"] is False


def test_a_model_saved_before_the_rules_keeps_its_kernels(monkeypatch):
    program = quantized("bert")
    made, _ = timed(monkeypatch, program.clone(), (10.0, 5.0))
    older = {
        key: taken
        for key, taken in made.decisions.items()
        if not key.startswith(("QuantizeInNorm", "Mlp"))
    }
    assert len(older) < len(made.decisions)
    monkeypatch.setattr(gate, "alternate", refuse_to_time)
    lowered = lower(program, LoweringOptions(target="cpu", decisions=older))
    assert kernels(lowered.program) == {
        "dynamic_linear_w8a8": 9,
        "embedding_int8": 3,
        "add_layer_norm": 5,
        "fused_attention": 2,
    }
    reasons = {r.reason for r in lowered.refusals}
    assert reasons == {"nothing was decided on it when the model was saved"}
    check(program, lowered)


def test_a_scale_in_front_of_the_linear_rides_in_the_norm():
    program = scaled(torch.rand(16) + 0.5)
    assert kernels(lower(program, UNTIMED).program) == {"dynamic_linear_w8a8": 1}  # no norm there

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16)
            self.factors = nn.Parameter(torch.rand(16) + 0.5)

        def forward(self, x):
            return self.linear(self.norm(x) * self.factors)

    program = apply(small(Normed(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"norm_quantize": 1, "linear_w8a8": 1}
    (node,) = lowered.program.nodes(ops.norm_quantize.default)
    assert argument(node, "pre_scale") is not None
    assert {user.target for user in node.users} == {operator.getitem}
    check(program, lowered)
