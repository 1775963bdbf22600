"""Lowering: what each rule replaces, that values stay, and what the speed gate decides."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fxopt.analysis.samples import Sample
from fxopt.capture import capture_program
from fxopt.errors import LoweringError
from fxopt.ir.program import Level, Program, module_path
from fxopt.kernels import KERNELS
from fxopt.lowering import Lowered, LoweringOptions, gate, lower, resolve_target
from fxopt.lowering.lower import KeepFloating, default_shapes, kernel_names
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.quantization.quantize import (
    ActivationOptions,
    EmbeddingOptions,
    Quantize,
    WeightOptions,
)
from fxopt.pipeline.lowered_check import check_lowered
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from fxopt.rewrite.driver import apply_rules
from fxopt.rewrite.pattern import argument
from tests.graphs import signature_of
from tests.models import canonical_program, randomize
from tests.zoo import ZOO

aten = torch.ops.aten
ops = torch.ops.fxopt
UNTIMED = LoweringOptions(target="cpu", speed_gate=False)
TIMED = LoweringOptions(target="cpu", shapes=[(1, 4), (2, 4)])
TOKEN = ActivationOptions(symmetric=False)
QUANTIZE = Quantize(activations=TOKEN, embeddings=EmbeddingOptions())


def apply(program: Program, *passes, samples=()) -> Program:
    return Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, passes)


@cache
def _quantized(name: str, quantize: Quantize) -> Program:
    program = canonical_program(name)
    return apply(program, quantize, samples=[Sample(x) for x in program.examples[:2]])


def quantized(name: str, quantize: Quantize = QUANTIZE) -> Program:
    return _quantized(name, quantize).clone()


def kernels(program: Program) -> dict[str, int]:
    """How often each kernel is called."""
    names = {kernel.overload: name for name, kernel in KERNELS.items()}
    return dict(Counter(names[node.target] for node in program.nodes() if node.target in names))


def run(program: Program, inputs) -> list[Tensor]:
    program.graph_module.recompile()
    with torch.no_grad():
        return list(program.graph_module(*inputs))


def check(program: Program, lowered: Lowered) -> dict:
    return check_lowered(program, lowered, Verifier(program.examples[:2]))


def small(module: nn.Module, *inputs: Tensor) -> Program:
    """A plain module at the canonical level, with its inputs as an example."""
    torch.manual_seed(0)
    program = apply(capture_program(module.eval(), inputs), Canonicalize())
    program.examples = [list(inputs)]
    return program


# --- what is replaced -----------------------------------------------------------------------

COUNTS = {
    # 2 layers: q, k, v merged behind a norm that quantizes, o, gate + up + down in one kernel; the
    # head, behind the last norm.
    "llama": {
        "dynamic_linear_w8a8": 2,
        "norm_quantize": 3,
        "linear_w8a8": 3,
        "dynamic_gated_mlp_w8a8": 2,
        "embedding_int8": 1,
        "fused_rms_norm": 2,
        "apply_rope": 4,
        "fused_attention": 2,
    },
    # 2 layers: q, k, v merged behind a norm that quantizes, o, the FFN in one kernel; the pooler.
    "bert": {
        "dynamic_linear_w8a8": 3,
        "norm_quantize": 2,
        "linear_w8a8": 2,
        "dynamic_mlp_w8a8": 2,
        "embedding_int8": 3,
        "add_layer_norm": 3,
        "fused_attention": 2,
    },
    # Fused qkv in the model; norms before, whose sums the residual reads.
    "gpt2": {
        "dynamic_linear_w8a8": 2,
        "norm_quantize": 3,
        "linear_w8a8": 3,
        "dynamic_mlp_w8a8": 2,
        "embedding_int8": 2,
        "fused_attention": 2,
    },
    # 3 layers, norms around both halves and on q and k.
    "gemma3": {
        "dynamic_linear_w8a8": 3,
        "norm_quantize": 4,
        "linear_w8a8": 4,
        "dynamic_gated_mlp_w8a8": 3,
        "embedding_int8": 1,
        "fused_rms_norm": 15,
        "apply_rope": 6,
        "fused_attention": 3,
    },
}


@pytest.mark.parametrize("name", COUNTS)
def test_kernels_stand_where_they_should(name):
    program = quantized(name)
    text = signature_of(program)
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == COUNTS[name]
    assert lowered.program.level is Level.LOWERED
    assert lowered.target == "cpu"
    left = (ops.quantize.default, ops.dequantize.default, ops.choose_qparams.default)
    assert not lowered.program.nodes(*left, aten.linear.default)
    assert not lowered.kept_floating
    assert (lowered.timings, lowered.decisions, lowered.timed_sites) == ({}, {}, [])
    # The program that came in keeps its graph and its level.
    assert signature_of(program) == text
    assert program.level is Level.QUANTIZED
    measured = check(program, lowered)
    assert measured["sqnr_db"] is None or measured["sqnr_db"] > 35


@pytest.mark.parametrize("name", COUNTS)
def test_every_linear_has_a_site_with_its_module_path(name):
    program = quantized(name)
    lowered = lower(program, UNTIMED)
    linears = {module_path(node) for node in program.nodes(aten.linear.default)}
    found = {site.path for site in lowered.sites if site.detail == "DynamicLinear"}
    assert found == linears
    assert all(site.path for site in lowered.sites)


def test_refusals_name_the_place_and_the_reason():
    lowered = lower(quantized("gpt2"), UNTIMED)
    assert {r.reason for r in lowered.refusals} == {"the sum is read elsewhere too"}
    assert {r.site.partition(" [")[0] for r in lowered.refusals} == {
        f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)
    }


def test_a_program_without_quantization_keeps_its_linears():
    program = canonical_program("llama")
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {
        "fused_rms_norm": 5,
        "apply_rope": 4,
        "gated_activation": 2,
        "fused_attention": 2,
    }
    assert len(lowered.program.nodes(aten.linear.default)) == 15
    measured = check(program, lowered)
    assert measured["sqnr_db"] is None or measured["sqnr_db"] > 100


# --- variants of quantization ---------------------------------------------------------------

TENSOR = ActivationOptions(granularity="tensor")
ROWS = WeightOptions(granularity="block", block_size=(4, -1))
VARIANTS = {
    "w8a16": (Quantize(), "linear_w8a16"),
    "static": (Quantize(activations=TENSOR), "linear_w8a8"),
    "static asymmetric": (
        Quantize(activations=ActivationOptions(granularity="tensor", symmetric=False)),
        "linear_w8a8",
    ),
    "dynamic": (Quantize(activations=ActivationOptions()), "dynamic_linear_w8a8"),
    "dynamic asymmetric": (Quantize(activations=TOKEN), "dynamic_linear_w8a8"),
    "weights per tensor": (
        Quantize(WeightOptions(granularity="tensor"), ActivationOptions()),
        "dynamic_linear_w8a8",
    ),
    "weights per group of rows": (
        Quantize(ROWS, ActivationOptions()),
        "dynamic_linear_w8a8",
    ),
    "w8a16 per group of rows": (Quantize(ROWS), "linear_w8a16"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_its_kernel(variant):
    quantize, kernel = VARIANTS[variant]
    program = quantized("bert", quantize)
    lowered = lower(program, UNTIMED)
    found = kernels(lowered.program)
    linears = {name: count for name, count in found.items() if "linear" in name}
    # Of 13, q, k and v are merged. Where they quantize, those of a feed-forward become one kernel,
    # and the norm before q, k and v gives them their codes.
    dynamic = kernel == "dynamic_linear_w8a8"
    assert linears == ({kernel: 3, "linear_w8a8": 2} if dynamic else {kernel: 9})
    joined = [found.get(name, 0) for name in ("dynamic_mlp_w8a8", "norm_quantize")]
    assert joined == ([2, 2] if dynamic else [0, 0])
    for node in lowered.program.nodes(KERNELS[kernel].overload):
        weight = node.args[3 if kernel == "linear_w8a8" else 1]
        assert lowered.program.constant(weight).dtype == torch.int8
        if kernel != "linear_w8a16":
            # The sums of a weight's rows are what the zero point of the activation needs.
            sums = node.args[5 if kernel == "linear_w8a8" else 3]
            assert (sums is not None) == ("asymmetric" in variant)
            if sums is not None:
                rows = lowered.program.constant(weight).sum(1, dtype=torch.int32)
                assert torch.equal(lowered.program.constant(sums), rows)
    assert sum("gelu" in node.args for node in lowered.program.nodes()) == 2
    assert not lowered.program.nodes(aten.gelu.default)
    check(program, lowered)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (WeightOptions(granularity="group", group_size=16), "scales per block [1, 16]"),
        (WeightOptions(granularity="block", block_size=(4, 16)), "scales per block [4, 16]"),
        (WeightOptions(symmetric=False), None),
    ],
)
@pytest.mark.parametrize("activations", [None, TOKEN], ids=["w8a16", "w8a8"])
def test_weights_that_no_kernel_takes_run_in_floating_point(weights, reason, activations):
    program = quantized("bert", Quantize(weights, activations))
    lowered = lower(program, UNTIMED)
    assert len(lowered.program.nodes(aten.linear.default)) == 13
    assert not any("linear" in name for name in kernels(lowered.program))
    assert not lowered.program.nodes(ops.dequantize.default, ops.quantize.default)
    if reason is not None:
        refused = {r.site for r in lowered.refusals if reason in r.reason}
        assert len(refused) == 13
    # The values are those of the integers, and no rounding of activations is left.
    held = lowered.program.weights()
    assert not any(value.dtype == torch.int8 for value in held.values())
    for node in program.nodes(aten.linear.default):
        back = node.args[1]
        parts = [program.constant(arg) for arg in back.args[:3]]
        values = ops.dequantize(*parts, *back.args[3:])
        assert torch.equal(held[f"{back.args[0].target}_floating"], values)
    assert lowered.kept_floating == (
        {node.name for node in program.nodes(aten.linear.default)} if activations else set()
    )
    check(program, lowered)


def test_rows_of_a_group_repeat_its_scale():
    program = quantized("bert", Quantize(ROWS, TOKEN))
    lowered = lower(program, UNTIMED)
    scale = program.weight("pooler.dense.weight_int8_scale")
    rows = lowered.program.weight("pooler.dense.weight_int8_scale_rows")
    assert torch.equal(rows, scale.expand(-1, 4).flatten())
    assert_same(program, lowered, 1e-5)


@cache
def _bf16(granularity: str) -> Program:
    torch.manual_seed(0)
    model = ZOO["bert"]().eval()
    randomize(model)
    program = apply(capture_program(model.to(torch.bfloat16)), Canonicalize())
    samples = [Sample(x) for x in program.examples[:2]]
    quantize = Quantize(
        activations=ActivationOptions(granularity=granularity), embeddings=EmbeddingOptions()
    )
    return apply(program, quantize, samples=samples)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_bf16_programs_run_in_bf16(granularity):
    program = _bf16(granularity).clone()
    lowered = lower(program, UNTIMED)
    static = {
        "linear_w8a8": 9,
        "embedding_int8": 3,
        "add_layer_norm": 5,
        "fused_attention": 2,
    }
    assert kernels(lowered.program) == (COUNTS["bert"] if granularity == "token" else static)
    check(program, lowered)
    for out in run(lowered.program, program.examples[1]):
        assert out.dtype == torch.bfloat16


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_a_lowered_program_computes_what_it_came_from(name):
    """At every example: several sizes, with and without cache, with padding."""
    program = quantized(name)
    lowered = lower(program, UNTIMED)
    for inputs in program.examples:
        for ours, theirs in zip(run(lowered.program, inputs), run(program, inputs), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert float(error) < 0.03


def test_a_kernel_that_computes_something_else_is_caught(monkeypatch):
    program = quantized("bert")
    lowered = lower(program, UNTIMED)
    kernel = KERNELS["add_layer_norm"]
    right = kernel.reference
    monkeypatch.setattr(kernel, "reference", lambda *args: right(*args) * 1.05)
    with pytest.raises(
        LoweringError, match=r"add_layer_norm\S* at encoder.layer.0.attention.output"
    ):
        check(program, lowered)


def test_wrong_weights_in_the_lowered_program_are_caught():
    """Every kernel agrees with its reference there; only the whole shows it."""
    program = quantized("bert")
    lowered = lower(program, UNTIMED)
    name = "pooler.dense.weight_int8_scale_rows"
    lowered.program.set_weight(name, lowered.program.weight(name) * 1.5)
    with pytest.raises(LoweringError, match="changed output .*target='reference'"):
        check(program, lowered)


# --- merged siblings ------------------------------------------------------------------------


def test_merged_weights_are_shared_with_the_program():
    program = quantized("llama")
    before = {name: value.clone() for name, value in program.weights().items()}
    expected = run(program, program.examples[1])
    lowered = lower(program, UNTIMED)
    after, merged = program.weights(), lowered.program.weights()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    groups = {
        **{f"model.layers.{i}.self_attn.q_proj": ("q", "k", "v") for i in (0, 1)},
        **{f"model.layers.{i}.mlp.gate_proj": ("gate", "up") for i in (0, 1)},
    }
    for first, parts in groups.items():
        whole = merged[f"{first}.weight_int8_merged"]
        start = 0
        for part in parts:
            name = first.replace("q_proj", f"{part}_proj").replace("gate_proj", f"{part}_proj")
            view = after[f"{name}.weight_int8"]
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert torch.equal(view, whole[start : start + view.shape[0]])
            start += view.shape[0]
        assert start == whole.shape[0]
    # Nothing is held twice: the integers of both programs together are those of one.
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*after.values(), *merged.values()]
        if t.dtype == torch.int8
    }
    assert sum(storages.values()) == sum(
        t.numel() for t in before.values() if t.dtype == torch.int8
    )
    for ours, theirs in zip(run(program, program.examples[1]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_only_linears_on_the_same_input_are_merged():
    lowered = lower(quantized("bert"), UNTIMED)
    details = Counter(site.detail for site in lowered.sites if "merged" in site.detail)
    assert details == {"merged with 2 siblings": 6}
    paths = {site.path for site in lowered.sites if "merged" in site.detail}
    assert paths == {
        f"encoder.layer.{i}.attention.self.{part}"
        for i in (0, 1)
        for part in ("query", "key", "value")
    }


class TiedSiblings(nn.Module):
    """Two linears on one input, one of which shares its weight with a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.a(x) + self.b(x)))


def test_a_weight_that_others_read_stays_where_it_is():
    program = apply(small(TiedSiblings(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    assert not any("merged" in site.detail for site in lowered.sites)
    assert kernels(lowered.program) == {"dynamic_linear_w8a8": 3}
    check(program, lowered)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_siblings_read_the_same_codes_and_are_merged(symmetric):
    options = ActivationOptions(granularity="tensor", symmetric=symmetric)
    program = quantized("bert", Quantize(activations=options))
    before = program.nodes(ops.quantize.default)
    lowered = lower(program, UNTIMED)
    details = Counter(site.detail for site in lowered.sites if "merged" in site.detail)
    assert details == {"merged with 2 siblings": 6}
    assert (len(before), len(lowered.program.nodes(ops.quantize.default))) == (13, 9)
    assert_same(program, lowered, 1e-3)
    check(program, lowered)


def test_siblings_with_and_without_bias_are_not_merged():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], -1)

    program = apply(small(Mixed(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"dynamic_linear_w8a8": 2}
    check(program, lowered)


# --- scales that ride -----------------------------------------------------------------------

LINEARS = (ops.dynamic_linear_w8a8.default, ops.linear_w8a8.default, ops.linear_w8a16.default)
BY_GRANULARITY = {"token": TOKEN, "tensor": TENSOR}


def smoothed(program: Program, activations: ActivationOptions, fold: bool = True) -> Program:
    samples = [Sample(x) for x in program.examples[:2]]
    smooth = SmoothQuant(
        fold=fold, granularity=activations.granularity, symmetric=activations.symmetric
    )
    return apply(program, smooth, Quantize(activations=activations), samples=samples)


def assert_same(program: Program, lowered: Lowered, tolerance: float) -> None:
    for inputs in program.examples:
        for ours, theirs in zip(run(lowered.program, inputs), run(program, inputs), strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert float(error) <= tolerance


def test_scales_in_front_of_dynamic_linears_ride_in_the_kernel():
    program = smoothed(canonical_program("bert"), TOKEN)
    # q/k/v and up of two layers are read through a scale, down too; the pooler.
    assert len(program.nodes(aten.mul.Tensor)) == 7
    lowered = lower(program, UNTIMED)
    assert not lowered.program.nodes(aten.mul.Tensor)
    nodes = lowered.program.nodes(ops.dynamic_linear_w8a8.default)
    scaled = [node for node in nodes if argument(node, "pre_scale") is not None]
    assert (len(nodes), len(scaled)) == (3, 1)  # v -> o folded
    norms = lowered.program.nodes(ops.norm_quantize.default)
    assert [argument(node, "pre_scale") is not None for node in norms] == [True, True]
    blocks = lowered.program.nodes(ops.dynamic_mlp_w8a8.default)
    for name in ("pre_scale", "down_pre_scale"):
        assert [argument(node, name) is not None for node in blocks] == [True, True]
    assert sum("merged with 2 siblings" in site.detail for site in lowered.sites) == 6
    assert sum(site.detail == "DynamicPreScale" for site in lowered.sites) == 11
    assert_same(program, lowered, 1e-5)
    check(program, lowered)


def test_both_scales_of_a_gated_block_ride_in_its_kernel():
    program = smoothed(canonical_program("llama"), TOKEN, fold=False)
    unscaled = len(canonical_program("llama").nodes(aten.mul.Tensor))
    assert len(program.nodes(aten.mul.Tensor)) == unscaled + 9
    lowered = lower(program, UNTIMED)
    embeddings = {"embedding_int8": 1}
    assert kernels(lowered.program) | embeddings == COUNTS["llama"]
    for node in lowered.program.nodes(ops.dynamic_gated_mlp_w8a8.default):
        assert argument(node, "pre_scale") is not None
        assert argument(node, "down_pre_scale") is not None
    readers = lowered.program.nodes(*LINEARS, ops.dynamic_gated_mlp_w8a8.default)
    assert not any(node.args[0].target is aten.mul.Tensor for node in readers)
    assert_same(program, lowered, 1e-5)
    check(program, lowered)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_in_front_of_static_linears_divide_the_step(symmetric):
    options = ActivationOptions(granularity="tensor", symmetric=symmetric)
    program = smoothed(canonical_program("bert"), options)
    assert len(program.nodes(aten.mul.Tensor)) == 7
    lowered = lower(program, UNTIMED)
    assert not lowered.program.nodes(aten.mul.Tensor)
    blocks = Counter(tuple(q.args[3]) for q in lowered.program.nodes(ops.quantize.default))
    # q, k and v read the same codes.
    assert blocks == {(-1, -1, 1): 6, (-1, 1): 1, (-1, -1, -1): 2}
    # A number on the edge between two integers may become the other one.
    assert_same(program, lowered, 1e-3)
    check(program, lowered)


@pytest.mark.parametrize("granularity", BY_GRANULARITY)
def test_scales_ride_in_bf16_without_a_rounding(granularity):
    torch.manual_seed(0)
    model = ZOO["bert"]().eval()
    randomize(model)
    program = apply(capture_program(model.to(torch.bfloat16)), Canonicalize())
    program = smoothed(program, BY_GRANULARITY[granularity])
    assert program.nodes(aten.mul.Tensor)
    lowered = lower(program, UNTIMED)
    assert not lowered.program.nodes(aten.mul.Tensor)
    check(program, lowered)


class Scaled(nn.Module):
    """Two linears behind one product, or each behind its own; a residual may read it too."""

    def __init__(self, factors: Tensor, *, shared: bool = True, residual: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.factors = nn.Parameter(factors)
        self.others = None if shared else nn.Parameter(factors + 1)
        self.residual = residual

    def forward(self, x):
        y = x * self.factors
        z = y if self.others is None else x * self.others
        out = self.a(y) + self.b(z)
        return out + y if self.residual else out


def scaled(factors: Tensor, activations: ActivationOptions | None = TOKEN, **options) -> Program:
    x = torch.randn(2, 3, 16)
    program = small(Scaled(factors, **options), x)
    return apply(program, Quantize(activations=activations), samples=[Sample([x])])


@pytest.mark.parametrize("activations", BY_GRANULARITY.values(), ids=BY_GRANULARITY)
def test_a_product_that_others_read_stays_for_them(activations):
    program = scaled(torch.rand(16) + 0.5, activations, residual=True)
    lowered = lower(program, UNTIMED)
    (product,) = lowered.program.nodes(aten.mul.Tensor)
    assert not {user.target for user in product.users} & {*LINEARS, ops.quantize.default}
    check(program, lowered)


def test_siblings_with_one_scale_are_merged_and_others_are_not():
    factors = torch.rand(16) + 0.5
    for shared in (True, False):
        program = scaled(factors, shared=shared)
        lowered = lower(program, UNTIMED)
        assert kernels(lowered.program) == {"dynamic_linear_w8a8": 1 if shared else 2}
        assert not lowered.program.nodes(aten.mul.Tensor)
        check(program, lowered)


@pytest.mark.parametrize("activations", BY_GRANULARITY.values(), ids=BY_GRANULARITY)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1,), torch.float32), ((3, 16), torch.float32), ((), torch.float32), ((16,), torch.float64)],
)
def test_factors_that_are_not_one_scale_per_channel_stay(shape, dtype, activations):
    factors = torch.rand(shape, dtype=dtype) + 0.5
    x = torch.randn(2, 3, 16)
    program = small(Scaled(factors).to(factors.dtype), x)
    program = apply(program, Quantize(activations=activations), samples=[Sample([x])])
    lowered = lower(program, UNTIMED)
    assert len(lowered.program.nodes(aten.mul.Tensor)) == 1
    check(program, lowered)


def test_a_scale_in_front_of_integer_weights_alone_stays():
    program = scaled(torch.rand(16) + 0.5, None)
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"linear_w8a16": 1}
    assert len(lowered.program.nodes(aten.mul.Tensor)) == 1
    check(program, lowered)


def test_a_scale_whose_linears_run_in_floating_point_stays(monkeypatch):
    for activations in BY_GRANULARITY.values():
        program = scaled(torch.rand(16) + 0.5, activations)
        lowered, _ = timed(monkeypatch, program, (10.0, 20.0))
        assert kernels(lowered.program) == {}
        assert len(lowered.program.nodes(aten.mul.Tensor)) == 1
        check(program, lowered)


def test_riding_is_timed_like_any_kernel(monkeypatch):
    for activations, rule in zip(BY_GRANULARITY.values(), ("Dynamic", "Static"), strict=True):
        program = scaled(torch.rand(16) + 0.5, activations)
        made, _ = timed(monkeypatch, program.clone(), (10.0, 5.0))
        assert not made.program.nodes(aten.mul.Tensor)
        (key,) = (key for key in made.decisions if key.startswith(f"{rule}PreScale"))
        monkeypatch.setattr(gate, "alternate", refuse_to_time)
        options = LoweringOptions(target="cpu", decisions={**made.decisions, key: False})
        lowered = lower(program, options)
        assert len(lowered.program.nodes(aten.mul.Tensor)) == 1
        assert {r.reason for r in lowered.refusals} == {"slower than what it replaces"}
        check(program, lowered)


# --- epilogues ------------------------------------------------------------------------------


class WithActivation(nn.Module):
    """linear -> activation; `twice` reads the linear's result a second time."""

    def __init__(self, activation: Callable[[Tensor], Tensor], twice: bool):
        super().__init__()
        self.linear, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.activation, self.twice = activation, twice

    def forward(self, x):
        h = self.linear(x)
        y = self.activation(h)
        return self.out(y + h if self.twice else y)


ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": nn.functional.silu,
}
SCHEMES = {
    "dynamic": Quantize(activations=ActivationOptions()),
    "static": Quantize(activations=TENSOR),
    "weights": Quantize(),
}


@cache
def _with_activation(activation: str, twice: bool) -> Program:
    return small(WithActivation(ACTIVATIONS[activation], twice), torch.ones(2, 3, 16))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_becomes_the_epilogue_of_its_only_linear(activation, scheme):
    x = torch.randn(2, 3, 16)
    for twice in (False, True):
        program = _with_activation(activation, twice).clone()
        program = apply(program, SCHEMES[scheme], samples=[Sample([x])])
        lowered = lower(program, UNTIMED)
        epilogues = [
            next(arg for arg in node.args if isinstance(arg, str))
            for node in lowered.program.nodes()
            if node.target in {kernel.overload for kernel in KERNELS.values()}
        ]
        block = [activation] if scheme == "dynamic" else [activation, "none"]
        assert epilogues == (["none", "none"] if twice else block)
        left = (aten.gelu.default, aten.relu.default, aten.silu.default)
        assert len(lowered.program.nodes(*left)) == twice
        reasons = [refusal.reason for refusal in lowered.refusals]
        assert ("the linear's output is read elsewhere too" in reasons) == twice
        check(program, lowered)


def test_a_second_activation_is_not_fused():
    def both(x):
        return torch.relu(nn.functional.gelu(x))

    program = apply(small(WithActivation(both, False), torch.randn(2, 3, 16)), SCHEMES["dynamic"])
    lowered = lower(program, UNTIMED)
    assert lowered.program.nodes(aten.relu.default)
    assert [r.reason for r in lowered.refusals] == ["the linear has an epilogue already"]
    check(program, lowered)


# --- feed-forward blocks --------------------------------------------------------------------


class FeedForward(nn.Module):
    """down(act(up(x))); `twice` reads the hidden values a second time."""

    def __init__(self, activation: Callable[[Tensor], Tensor], twice: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.activation, self.twice = activation, twice

    def forward(self, x):
        hidden = self.activation(self.up(x))
        out = self.down(hidden)
        return out + hidden.mean(-1, keepdim=True) if self.twice else out


@pytest.mark.parametrize("options", [TOKEN, ActivationOptions()], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_feed_forward_block_becomes_one_kernel(monkeypatch, activation, options):
    program = small(FeedForward(ACTIVATIONS[activation]), torch.randn(2, 3, 16))
    program = apply(program, Quantize(activations=options))
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"dynamic_mlp_w8a8": 1}
    (site,) = (site for site in lowered.sites if site.detail == "Mlp")
    assert site.path == "down"
    # In float32 it is its two linears, to the bit.
    made, _ = timed(monkeypatch, program.clone(), (10.0, 5.0))
    (key,) = (key for key in made.decisions if key.startswith("Mlp"))
    apart = {**made.decisions, key: False}
    two = lower(program, LoweringOptions(target="cpu", decisions=apart))
    assert kernels(two.program) == {"dynamic_linear_w8a8": 2}
    for inputs in program.examples:
        for a, b in zip(run(lowered.program, inputs), run(two.program, inputs), strict=True):
            assert torch.equal(a, b)
    check(program, lowered)


def test_hidden_values_that_others_read_stay_in_memory():
    program = small(FeedForward(torch.relu, twice=True), torch.randn(2, 3, 16))
    program = apply(program, Quantize(activations=TOKEN))
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"dynamic_linear_w8a8": 2}
    assert "the activation is read elsewhere too" in {r.reason for r in lowered.refusals}
    check(program, lowered)


def test_two_linears_without_an_activation_are_no_feed_forward_block():
    program = apply(
        small(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 3, 16)),
        Quantize(activations=TOKEN),
    )
    lowered = lower(program, UNTIMED)
    assert kernels(lowered.program) == {"dynamic_linear_w8a8": 2}
    assert not lowered.refusals


# --- the gate -------------------------------------------------------------------------------


class Clock:
    """Stands in for `alternate`: says what it is told, and counts."""

    def __init__(self, *answers: tuple[float, float]):
        self.answers, self.calls = answers, 0

    def __call__(self, before, after):
        with torch.no_grad():  # both must at least run
            before()
            after()
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        return answer


def timed(monkeypatch, program: Program, *answers: tuple[float, float], **options):
    clock = Clock(*answers)
    monkeypatch.setattr(gate, "alternate", clock)
    chosen = LoweringOptions(target="cpu", shapes=TIMED.shapes, **options)
    return lower(program, chosen), clock


def test_faster_kernels_are_taken_and_alike_sites_are_timed_once(monkeypatch):
    program = quantized("llama")
    lowered, clock = timed(monkeypatch, program, (10.0, 5.0))
    assert kernels(lowered.program) == COUNTS["llama"]
    assert set(lowered.decisions.values()) == {True}
    assert clock.calls == len(TIMED.shapes) * len(lowered.decisions)
    assert set(lowered.timings) == set(lowered.decisions)
    assert len(lowered.timed_sites) > len(lowered.decisions)
    # Both layers were decided together, but for the first norm, which reads no sum.
    layers = [
        Counter(
            (path.replace(f"layers.{i}", "layers"), rule, key)
            for path, rule, key in lowered.timed_sites
            if f"layers.{i}." in path and rule != "QuantizeInNorm"
        )
        for i in (0, 1)
    ]
    assert layers[0] == layers[1]
    assert layers[0].total() > 10
    # Layers of other shapes were not.
    sites = {path: key for path, rule, key in lowered.timed_sites if rule == "DynamicLinear"}
    assert sites["lm_head"] != sites["model.layers.0.self_attn.q_proj"]
    timing = next(iter(lowered.timings.values()))
    assert (timing.before, timing.after, timing.ratio) == ((10.0, 10.0), (5.0, 5.0), 0.5)


def test_slower_kernels_are_refused_and_linears_run_in_floating_point(monkeypatch):
    program = quantized("llama")
    lowered, clock = timed(monkeypatch, program, (10.0, 20.0))
    # A table of the vocabulary is worth more than the microseconds of a lookup.
    assert kernels(lowered.program) == {"embedding_int8": 1}
    assert set(lowered.decisions.values()) == {False}
    assert len(lowered.program.nodes(aten.linear.default)) == 15
    assert len(lowered.program.nodes(aten.rms_norm.default)) == 5
    assert not lowered.program.nodes(ops.quantize.default, ops.choose_qparams.default)
    assert len(lowered.kept_floating) == 15
    # A kernel is turned down only after it has lost several times.
    assert clock.calls == gate._TRIALS * len(TIMED.shapes) * len(lowered.decisions)
    reasons = {refusal.reason for refusal in lowered.refusals}
    assert reasons == {
        "slower than what it replaces: 20 us against 10 us, 20 us against 10 us",
        "the activation is quantized too",  # why not as a product with int8 weights only
    }
    # It is compared with the program less the rounding that was dropped.
    oracle = lowered.oracle(program)
    assert not oracle.nodes(ops.quantize.default)
    for inputs in program.examples[:2]:
        for a, b in zip(run(lowered.program, inputs), run(oracle, inputs), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert check(program, lowered)["sqnr_db"] is None or check(program, lowered)["sqnr_db"] > 100


def test_the_oracle_of_a_fully_lowered_program_is_the_program_itself(monkeypatch):
    program = quantized("llama")
    lowered, _ = timed(monkeypatch, program, (10.0, 5.0))
    assert lowered.oracle(program) is program


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("activations", "answers", "taken"),
    [
        (TOKEN, [(100.0, 102.0)], True),  # within what a clock can tell
        (TOKEN, [(100.0, 104.0)], False),
        (None, [(100.0, 145.0)], True),  # the alternative is a weight in floating point
        (None, [(100.0, 155.0)], False),
        (
            TOKEN,
            [(100.0, 200.0), (100.0, 40.0)],
            True,
        ),  # 2x slower at one shape, 2.5x faster at the other
        (TOKEN, [(100.0, 300.0), (100.0, 40.0)], False),
        (TOKEN, [(10.0, 90.0)] * 4 + [(10.0, 5.0)] * 2, True),  # disturbed twice, then fast
    ],
)
def test_what_counts_as_slower(monkeypatch, activations, answers, taken):
    program = apply(small(One(), torch.randn(2, 3, 16)), Quantize(activations=activations))
    # The answers go round by shape.
    rounds = answers * 3 if len(answers) == 2 else answers
    lowered, _ = timed(monkeypatch, program, *rounds)
    (rule, first), *_ = lowered.decisions.items()  # where it lost, others may be tried
    assert rule.startswith("DynamicLinear" if activations else "WeightOnlyLinear")
    assert first == taken
    wanted = "dynamic_linear_w8a8" if activations else "linear_w8a16"
    assert (wanted in kernels(lowered.program)) == taken, kernels(lowered.program)
    check(program, lowered)


def refuse_to_time(before, after):
    raise AssertionError("a frozen gate must not time")


@pytest.mark.parametrize("decision", [True, False])
def test_given_decisions_are_obeyed_without_timing(monkeypatch, decision):
    program = quantized("llama")
    # The second answer of each kind is never looked at.
    made, _ = timed(monkeypatch, program, (10.0, 5.0) if decision else (10.0, 20.0))
    monkeypatch.setattr(gate, "alternate", refuse_to_time)
    options = LoweringOptions(target="cpu", decisions=made.decisions)
    again = lower(quantized("llama"), options)
    assert signature_of(again.program) == signature_of(made.program)
    assert again.decisions == made.decisions
    assert {r.reason for r in again.refusals} == (
        set() if decision else {"slower than what it replaces", "the activation is quantized too"}
    )
    for a, b in zip(
        run(again.program, program.examples[1]),
        run(made.program, program.examples[1]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_sites_without_a_decision_are_lowered(monkeypatch):
    """What a model saved without the gate has: no decisions, and every kernel."""
    monkeypatch.setattr(gate, "alternate", refuse_to_time)
    lowered = lower(quantized("bert"), LoweringOptions(target="cpu", decisions={}))
    assert kernels(lowered.program) == COUNTS["bert"]


def test_single_decisions_decide_single_kinds_of_site(monkeypatch):
    program = quantized("bert")
    made, _ = timed(monkeypatch, program, (10.0, 5.0))
    wanted = {key: not key.startswith("AddLayerNorm") for key in made.decisions}
    lowered = lower(program, LoweringOptions(target="cpu", decisions=wanted))
    # Nor is one of the norms that quantize, on which nothing was decided as they are now.
    assert kernels(lowered.program) == {
        "dynamic_linear_w8a8": 5,
        "dynamic_mlp_w8a8": 2,
        "embedding_int8": 3,
        "fused_attention": 2,
    }
    assert len(lowered.program.nodes(aten.layer_norm.default)) == 5
    check(program, lowered)


def test_without_the_gate_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(gate, "alternate", refuse_to_time)
    assert kernels(lower(quantized("llama"), UNTIMED).program) == COUNTS["llama"]


def test_what_is_timed_is_the_float_part_against_the_kernel(monkeypatch):
    """A kernel is compared with what came in, not with the fake-quantized form of it."""
    seen = []

    def watch(before, after):
        with torch.no_grad():
            seen.append((before(), after()))
        return 2.0, 1.0

    monkeypatch.setattr(gate, "alternate", watch)
    torch.manual_seed(0)
    program = apply(
        small(WithActivation(torch.tanh, False), torch.randn(2, 7, 16)),
        Quantize(activations=ActivationOptions()),
    )
    # The batch is the gate's; what a plain module calls its other axes nobody knows.
    lower(program, LoweringOptions(target="cpu", shapes=[(3, 5)]))
    assert seen
    for before, after in seen:
        a, b = (x[0] if isinstance(x, tuple | list) else x for x in (before, after))
        assert a.shape == b.shape == (3, 7, 16)
        error = float((a - b).norm() / a.norm())
        assert 1e-4 < error < 0.1  # quantized against not quantized


def test_default_shapes():
    assert default_shapes(canonical_program("llama")) == [(1, 1), (1, 128)]
    assert default_shapes(canonical_program("bert")) == [(1, 128), (8, 64)]


def test_a_second_kernel_is_tried_where_the_first_is_slower(monkeypatch):
    """Quantizing apart from the product: two kernels, each decided by itself."""
    program = apply(small(One(), torch.randn(2, 3, 16)), Quantize(activations=TOKEN))
    slow = [(10.0, 20.0)] * gate._TRIALS * len(TIMED.shapes)
    lowered, _ = timed(monkeypatch, program, *slow, (10.0, 5.0))
    assert kernels(lowered.program) == {"linear_w8a8": 1}
    assert sorted(lowered.decisions.values()) == [False, True]
    check(program, lowered)


def test_keep_floating_takes_only_the_named_nodes():
    program = quantized("bert", Quantize(activations=TOKEN))
    first = program.nodes(aten.linear.default)[0].name
    sites, refusals = apply_rules(program, [KeepFloating({first})], "test")
    assert [site.node for site in sites] == [first]
    assert {refusal.reason for refusal in refusals} == {"it has a kernel"}


# --- targets --------------------------------------------------------------------------------


def test_the_reference_target_changes_nothing():
    program = quantized("llama")
    lowered = lower(program, LoweringOptions(target="reference"))
    assert lowered.target == "reference"
    assert signature_of(lowered.program) == signature_of(program)
    assert lowered.program.graph is not program.graph
    assert (lowered.sites, lowered.refusals) == ([], [])
    for inputs in program.examples[:2]:
        for a, b in zip(run(lowered.program, inputs), run(program, inputs), strict=True):
            assert torch.equal(a, b)


def test_auto_follows_the_weights():
    assert resolve_target(canonical_program("bert"), "auto") == "cpu"
    assert resolve_target(canonical_program("bert"), "reference") == "reference"


def test_cuda_weights_are_needed_for_cuda():
    with pytest.raises(LoweringError, match=r"weights are on 'cpu'.*\.to\('cuda'\).*'auto'"):
        lower(quantized("bert"), LoweringOptions(target="cuda"))


@pytest.mark.parametrize("target", ["tpu", "CPU", "", "cuda:0"])
def test_unknown_targets_are_named_with_the_choices(target):
    with pytest.raises(LoweringError, match="choose one of auto, reference, cpu, cuda"):
        lower(quantized("bert"), LoweringOptions(target=target))


def test_kernel_names_are_those_of_the_library():
    assert set(kernel_names()) == set(KERNELS)
    assert kernel_names() == sorted(kernel_names())
