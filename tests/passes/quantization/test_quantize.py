"""The quantize pass: which sites it takes, what it stores, and what it leaves alone."""

import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

import fxopt
from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.analysis.execution import run
from fxopt.analysis.samples import Sample, real_rows
from fxopt.capture import capture_program
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, module_path
from fxopt.passes.base import Context
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.quantization.gobo import Gobo
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.llm_int8 import LlmInt8
from fxopt.passes.quantization.options import (
    ActivationOptions,
    Choice,
    EmbeddingOptions,
    WeightOptions,
)
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier
from tests.graphs import signature_of
from tests.models import canonical_program, randomize, zoo_model
from tests.zoo import ZOO

aten = torch.ops.aten
ops = torch.ops.fxopt
TOKEN, TENSOR = ActivationOptions(), ActivationOptions(granularity="tensor", symmetric=False)
EMBEDDINGS = EmbeddingOptions()


def apply(program: Program, samples=(), **options) -> Program:
    """The program after one quantize pass, unverified."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return manager(samples).run(program, [Quantize(**options)])


def manager(samples=()) -> Manager:
    return Manager(Verifier((), mode="off"), samples=lambda: samples)


def paths(program: Program, *targets) -> set[str]:
    return {module_path(node) for node in program.nodes(*targets)}


def site_paths(program: Program) -> set[str]:
    return {site.path for site in program.history[-1].sites}


def refusals(program: Program) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in program.history[-1].refusals}


def stored(program: Program, node: Node, index: int) -> tuple[Tensor, Tensor, Tensor | None, list]:
    """The integers, scale, zero point and block that a node reads through `dequantize`."""
    back = node.args[index]
    assert back.target is ops.dequantize.default
    q, scale, zero, block = back.args[:4]
    return program.constant(q), program.constant(scale), program.constant(zero), list(block)


def by_path(program: Program, target=aten.linear.default) -> dict[str, Node]:
    return {module_path(node): node for node in program.nodes(target)}


def float_weights(
    program: Program, target=aten.linear.default, index: int = 1
) -> dict[str, Tensor]:
    return {p: program.constant(n.args[index]) for p, n in by_path(program, target).items()}


# --- sites ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "gemma3", "vit"])
def test_every_linear_is_a_site_and_really_stored_as_int8(name):
    before = canonical_program(name)
    linears, tables = paths(before, aten.linear.default), paths(before, aten.embedding.default)
    originals = float_weights(before)
    after = apply(before, activations=TOKEN, embeddings=EMBEDDINGS)
    assert linears
    assert site_paths(after) == linears | tables
    assert len(after.history[-1].sites) == len(before.nodes(aten.linear.default)) + len(
        before.nodes(aten.embedding.default)
    )
    assert after.level is Level.QUANTIZED
    for path, node in by_path(after).items():
        q, scale, zero, block = stored(after, node, 1)
        assert q.dtype == torch.int8
        assert (zero, block) == (None, [1, -1])
        original = originals[path]
        assert scale.shape == (original.shape[0], 1)
        error = (q.float() * scale - original).abs()
        assert bool((error <= scale * 0.5001).all())
    # No float copy is left: neither under the old name nor under any other.
    replaced = {t.data_ptr() for t in originals.values()}
    replaced |= {t.data_ptr() for t in float_weights(before, aten.embedding.default, 0).values()}
    held = after.weights()
    assert not replaced & {t.data_ptr() for t in held.values()}
    freed = {id(t): t for t in before.weights().values() if t.data_ptr() in replaced}.values()
    kept = before.byte_count() - sum(t.numel() * 4 for t in freed)
    integers = sum(t.numel() for t in freed)
    assert after.byte_count() == kept + integers + sum(t.shape[0] * 4 for t in freed)
    record = after.history[-1]
    assert (record.bytes_before, record.bytes_after) == (before.byte_count(), after.byte_count())


def blocks(program: Program) -> dict[str, list]:
    """The block of every linear that is a site."""
    sites = site_paths(program)
    linears = by_path(program).items()
    return {path: stored(program, node, 1)[3] for path, node in linears if path in sites}


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_heads_follow_the_heads(groups):
    before = canonical_program("bert")
    originals = float_weights(before)
    after = apply(before, weights=by_heads(groups))
    size = before.nodes(ops.attention.default)[0].meta["val"].shape[-1] // groups
    for path, block in blocks(after).items():
        columns = path.endswith("attention.output.dense")
        assert block == ([-1, size] if columns else [size, -1])
        q, scale, _, _ = stored(after, by_path(after)[path], 1)
        # Each slice of a head is rounded as if it stood alone.
        whole = originals[path]
        parts = whole.split(size, 1 if columns else 0)
        absmax = torch.stack([part.abs().max() for part in parts])
        assert torch.equal(scale.flatten(), absmax / 127)
        assert q.shape == whole.shape
    assert len(site_paths(after)) == len(originals)


def test_heads_of_a_fused_weight_have_scales_of_their_own():
    before = canonical_program("gpt2")
    size = before.nodes(ops.attention.default)[0].meta["val"].shape[-1]
    after = apply(before, weights=by_heads(1))
    found = blocks(after)
    fused = {path: block for path, block in found.items() if path.endswith("c_attn")}
    assert fused
    assert all(block == [size, -1] for block in fused.values())
    assert {tuple(block) for path, block in found.items() if path.endswith("attn.c_proj")} == {
        (-1, size)
    }


def test_without_heads_or_where_groups_do_not_divide_them_nothing_is_rounded():
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    plain = manager().run(capture_program(mlp, (torch.randn(2, 8),)), [Canonicalize()])
    for program, groups in ((plain, 1), (canonical_program("bert"), 3)):
        with pytest.warns(UserWarning, match="changed nothing"):
            after = manager().run(program, [Quantize(weights=by_heads(groups))])
        reason = f"no head of attention was found that {groups} groups divide"
        assert reason in refusals(after).values()
        assert float_weights(after).keys() == float_weights(program).keys()


@pytest.mark.parametrize("groups", [None, 0])
def test_heads_need_their_number_of_groups(groups):
    with pytest.raises(RecipeError, match="granularity 'head' needs groups_per_head"):
        by_heads(groups)


def test_passes_that_do_not_see_the_program_take_no_heads():
    for build in (lambda: Choice(by_heads(1)), lambda: AwqScale(weights=by_heads(1))):
        with pytest.raises(RecipeError, match="takes no granularity 'head'"):
            build()


def by_heads(groups: int | None) -> WeightOptions:
    return WeightOptions(granularity="head", groups_per_head=groups)


def test_nothing_else_is_changed():
    before = canonical_program("bert")
    text, weights = signature_of(before), dict(before.weights())
    after = apply(before, activations=TOKEN, embeddings=EMBEDDINGS)
    # The program that went in is untouched.
    assert signature_of(before) == text
    assert all(before.weights()[name] is value for name, value in weights.items())
    assert len(before.history) + 1 == len(after.history)
    # Weights without a site are the same memory; every other node is the same call.
    left = {n: v for n, v in after.weights().items() if n in weights}
    assert len(left) == len(weights) - 13 - 3
    assert all(value.data_ptr() == weights[name].data_ptr() for name, value in left.items())
    new = {ops.choose_qparams.default, ops.quantize.default, ops.dequantize.default}
    old_calls = [(n.name, str(n.target)) for n in before.nodes()]
    new_calls = [
        (n.name, str(n.target))
        for n in after.nodes()
        if n.target not in new and "getitem" not in n.name
    ]
    assert old_calls == new_calls
    biases = {module_path(n): before.constant(n.args[2]) for n in before.nodes(aten.linear.default)}
    for path, node in by_path(after).items():
        assert after.constant(node.args[2]).data_ptr() == biases[path].data_ptr()


def test_weights_only_leaves_activations_alone():
    after = apply(canonical_program("llama"))
    assert not after.nodes(ops.quantize.default, ops.choose_qparams.default)
    assert len(after.nodes(ops.dequantize.default)) == 15
    assert all(detail == "int8 weight per channel" for detail in details(after))
    sources = {n.args[0].target for n in after.nodes(aten.linear.default)}
    assert ops.dequantize.default not in sources


def details(program: Program) -> list[str]:
    return [site.detail for site in program.history[-1].sites]


def test_dynamic_activations_are_rounded_per_token():
    program = canonical_program("llama")
    for symmetric, low in ((True, -127), (False, -128)):
        after = apply(program, activations=ActivationOptions(symmetric=symmetric))
        for node in after.nodes(aten.linear.default):
            back = node.args[0]
            assert back.target is ops.dequantize.default
            q, scale, zero, block = back.args[:4]
            assert block == [1, 1, -1]
            assert (zero is None) == symmetric
            assert q.target is ops.quantize.default
            assert q.args[1] is scale
            assert q.args[4:] == (torch.int8, low, 127)
            qparams = scale.args[0]
            assert qparams.target is ops.choose_qparams.default
            assert qparams.args[0] is q.args[0]
            assert qparams.args[1:] == ([1, 1, -1], symmetric, low, 127)


def test_embedding_tables_are_stored_per_row():
    before = canonical_program("bert")
    tables = float_weights(before, aten.embedding.default, 0)
    after = apply(before, embeddings=EMBEDDINGS, exclude=("encoder.*", "pooler.*"))
    assert site_paths(after) == set(tables)
    assert set(details(after)) == {"int8 table per row"}
    for path, node in by_path(after, aten.embedding.default).items():
        q, scale, _, block = stored(after, node, 0)
        rows = tables[path]
        assert block == [1, -1]
        assert torch.allclose(scale[:, 0], rows.abs().amax(1) / 127)
        assert bool(((q.float() * scale - rows).abs() <= 0.5001 * scale).all())
    whole = apply(before, embeddings=EmbeddingOptions(granularity="tensor"))
    for node in whole.nodes(aten.embedding.default):
        assert stored(whole, node, 0)[1].shape == (1, 1)
    none = apply(before)
    assert not paths(none, aten.embedding.default) & site_paths(none)


# --- tied weights ---------------------------------------------------------------------------


def test_a_tied_weight_is_quantized_once():
    after = apply(canonical_program("gemma3"), activations=TOKEN, embeddings=EMBEDDINGS)
    table = after.nodes(aten.embedding.default)[0].args[0]
    head = by_path(after)["lm_head"].args[1]
    assert [str(a) for a in table.args[:2]] == [str(a) for a in head.args[:2]]
    assert {"model.embed_tokens", "lm_head"} <= site_paths(after)
    shapes = [tuple(t.shape) for t in after.weights().values()]
    assert shapes.count((99, 32)) == 1
    assert "model.embed_tokens.weight" not in after.weights()


@pytest.mark.parametrize("chosen", ["lm_head", "model.embed_tokens"])
def test_with_one_of_two_tied_sites_the_float_weight_stays(chosen):
    before = canonical_program("gemma3")
    embeddings = EMBEDDINGS if chosen == "model.embed_tokens" else None
    exclude = ("lm_head",) if chosen == "model.embed_tokens" else ()
    after = apply(before, embeddings=embeddings, exclude=exclude)
    weights = after.weights()
    kept = weights["model.embed_tokens.weight"]
    assert kept.data_ptr() == before.weight("model.embed_tokens.weight").data_ptr()
    assert weights["model.embed_tokens.weight_int8"].dtype == torch.int8
    table, head = after.nodes(aten.embedding.default)[0], by_path(after)["lm_head"]
    quantized, floating = (head.args[1], table.args[0])
    if chosen == "model.embed_tokens":
        quantized, floating = (table.args[0], head.args[1])
    assert str(quantized.args[0].target) == "model.embed_tokens.weight_int8"
    assert str(floating.target) == "model.embed_tokens.weight"
    assert chosen in site_paths(after)


class Tied(nn.Module):
    """One weight read by an embedding and by two linears."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 12)
        self.first, self.second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, ids):
        return self.second(self.first(self.table(ids)))


def captured(module: nn.Module, *inputs: Tensor) -> Program:
    return manager().run(capture_program(module.eval(), inputs), [Canonicalize()])


def test_tied_sites_of_different_granularity_share_where_they_agree():
    program = captured(Tied(), torch.zeros(2, 3).long())
    table = EmbeddingOptions(granularity="tensor")
    after = apply(program, embeddings=table)
    linears = after.nodes(aten.linear.default)
    embedding = after.nodes(aten.embedding.default)[0]
    assert stored(after, embedding, 0)[1].shape == (1, 1)
    assert all(stored(after, node, 1)[1].shape == (12, 1) for node in linears)
    integers = [t for t in after.weights().values() if t.dtype == torch.int8]
    assert len(integers) == 2  # one per granularity, not one per site


# --- include and exclude --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ("*.mlp.*",)}, lambda p: ".mlp." in p),
        ({"exclude": ("lm_head",)}, lambda p: p != "lm_head"),
        ({"include": ("*_proj",), "exclude": ("*.layers.0.*",)}, lambda p: ".layers.1." in p),
        ({"exclude": ("model.layers.[0].*", "*head")}, lambda p: ".layers.1." in p),
        ({"include": ("model.layers.1.mlp.down_proj",)}, lambda p: p.endswith("1.mlp.down_proj")),
        ({"exclude": ("LM_HEAD",)}, lambda p: True),
    ],
)
def test_patterns_select_by_module_path(options, expected):
    before = canonical_program("llama")
    linears = paths(before, aten.linear.default)
    after = apply(before, **options)
    assert site_paths(after) == {path for path in linears if expected(path)}
    refused = refusals(after)
    assert set(refused) == linears - site_paths(after)
    for path, reason in refused.items():
        node = by_path(after)[path]
        assert after.constant(node.args[1]) is not None
        assert ("excluded by" in reason) != ("not selected by include" in reason)
        assert any(repr(pattern) in reason for group in options.values() for pattern in group)


def test_patterns_select_by_the_path_of_the_weight():
    """The tied head reads the embedding's weight and is found under both paths."""
    before = canonical_program("gemma3")
    chosen = apply(before, include=("model.embed_tokens",))
    assert site_paths(chosen) == {"lm_head"}
    left = apply(before, exclude=("model.embed_tokens",))
    assert site_paths(left) == paths(before, aten.linear.default) - {"lm_head"}
    assert refusals(left)["lm_head"] == "excluded by 'model.embed_tokens'"


# --- granularity ----------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("granularity", "group", "columns", "block"),
    [("tensor", None, 1, [-1, -1]), ("channel", None, 1, [1, -1]), ("group", 16, 2, [1, 16])],
)
def test_weights_are_stored_by_granularity(granularity, group, columns, block, symmetric):
    before = canonical_program("llama")
    originals = float_weights(before)
    after = apply(before, weights=WeightOptions("int8", granularity, group, symmetric))
    assert site_paths(after) == set(originals)
    for path, node in by_path(after).items():
        w = originals[path]
        q, scale, zero, found = stored(after, node, 1)
        assert found == block
        groups = w.reshape(1, -1) if granularity == "tensor" else w.reshape(-1, group or w.shape[1])
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        step = groups.abs().amax(1) / 127 if symmetric else (high - low) / 255
        assert torch.allclose(scale.flatten(), step)
        rows = 1 if granularity == "tensor" else w.shape[0]
        assert scale.shape == (rows, w.shape[1] // group if group else columns)
        assert (zero is None) == symmetric
        centred = q.float().reshape(groups.shape)
        if zero is not None:
            assert zero.shape == scale.shape
            assert zero.dtype == torch.int8
            centred = centred - zero.reshape(-1, 1)
        assert q.min() >= (-127 if symmetric else -128)
        error = (centred * step[:, None] - groups).abs()
        assert bool((error <= 0.5001 * step[:, None]).all())


def test_groups_of_rows_share_a_scale():
    before = canonical_program("llama")
    originals = float_weights(before)
    options = WeightOptions(granularity="block", block_size=(32, -1))
    after = apply(before, weights=options)
    refused = refusals(after)
    assert site_paths(after) | set(refused) == set(originals)
    assert refused  # 16 and 99 outputs
    for path, reason in refused.items():
        assert reason == f"block size 32 does not divide its {len(originals[path])} outputs"
    for path in site_paths(after):
        node = by_path(after)[path]
        w = originals[path]
        assert len(w) % 32 == 0
        q, scale, zero, block = stored(after, node, 1)
        assert (block, zero, scale.shape) == ([32, -1], None, (len(w) // 32, 1))
        groups = w.reshape(len(scale), -1)
        assert torch.allclose(scale, groups.abs().amax(1, keepdim=True) / 127)
        error = (q.float().reshape(groups.shape) * scale - groups).abs()
        assert bool((error <= 0.5001 * scale).all())
    details = {site.detail for site in after.history[-1].sites}
    assert details == {"int8 weight per group of 32 rows"}


def test_a_group_size_that_does_not_divide_is_refused_site_by_site():
    before = canonical_program("llama")
    after = apply(before, weights=WeightOptions(granularity="group", group_size=64))
    assert site_paths(after) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    refused = refusals(after)
    assert len(refused) == 13
    assert set(refused.values()) == {"group size 64 does not divide its 32 inputs"}


def test_without_any_site_the_user_is_warned():
    before = canonical_program("bert")
    options = WeightOptions(granularity="group", group_size=5)
    with pytest.warns(UserWarning, match="changed nothing.*group size 5 does not divide"):
        after = manager().run(before, [Quantize(weights=options)])
    assert signature_of(after) == signature_of(before)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("gptoss", "model.layers.0.mlp.experts.gate_up_proj", r"\[4, 32, 128\].*grouped_mm"),
        ("vit", "embeddings.patch_embeddings.projection.weight", r"\[32, 3, 8, 8\].*conv2d"),
    ],
)
@pytest.mark.parametrize(
    "rounded",
    [Quantize(activations=TOKEN), Gptq(WeightOptions()), LlmInt8(outliers="dynamic"), Gobo()],
    ids=lambda rounded: rounded.name,
)
def test_weights_without_a_rule_are_reported(rounded, name, site, reason):
    before = canonical_program(name)
    samples = [Sample(before.examples[0])] if isinstance(rounded, Gptq) else []
    after = manager(samples).run(before, [rounded])
    assert site in refusals(after)
    assert refusals(after)[site].endswith("has no quantized form yet")
    assert re.search(reason, refusals(after)[site])
    assert after.weight(site).data_ptr() == before.weight(site).data_ptr()


def test_a_weight_that_is_computed_is_refused():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(8, 8)

        def forward(self, x, w):
            return nn.functional.linear(self.plain(x), w)

    after = apply(captured(Computed(), torch.randn(2, 3, 8), torch.randn(8, 8)))
    assert site_paths(after) == {"plain"}
    assert list(refusals(after).values()) == ["the weight is computed in the graph, not stored"]


# --- running twice --------------------------------------------------------------------------


def test_a_second_run_does_nothing():
    options = {"activations": TOKEN, "embeddings": EMBEDDINGS}
    first = apply(canonical_program("bert"), **options)
    with pytest.warns(UserWarning, match="changed nothing.*already quantized"):
        second = manager().run(first, [Quantize(**options)])
    record = second.history[-1]
    assert record.sites == ()
    assert len(record.refusals) == 16
    assert {refusal.reason for refusal in record.refusals} == {"already quantized"}
    assert signature_of(second) == signature_of(first)
    assert second.level is Level.QUANTIZED
    assert {n: t.data_ptr() for n, t in second.weights().items()} == {
        n: t.data_ptr() for n, t in first.weights().items()
    }


def test_a_second_run_takes_what_the_first_left():
    first = apply(canonical_program("llama"), include=("*.mlp.*",))
    second = apply(first, activations=TOKEN)
    assert len(second.history[-1].sites) == 9
    assert sum(reason == "already quantized" for reason in refusals(second).values()) == 6


# --- static activations ---------------------------------------------------------------------


def bert_batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Token ids with padding of different lengths on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_sample(program: Program, batch: dict[str, Tensor]) -> Sample:
    from fxopt.pipeline.data import keyword_inputs

    inputs = keyword_inputs(program.signature, batch)
    return Sample(inputs, batch["attention_mask"].bool())


def eager_ranges(model: nn.Module, batches) -> dict[str, tuple[float, float]]:
    """The least and largest input of every nn.Linear over real tokens, by forward hooks."""
    seen: dict[str, list[Tensor]] = {}
    mask: list[Tensor] = []

    def hook(path):
        def watch(module, inputs):
            x = inputs[0]
            x = x[mask[0]] if x.dim() == 3 else x
            seen.setdefault(path, []).append(x.flatten())

        return watch

    handles = [
        module.register_forward_pre_hook(hook(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()]
            model(**batch)
    for handle in handles:
        handle.remove()
    joined = {path: torch.cat(values) for path, values in seen.items()}
    return {path: (float(x.min()), float(x.max())) for path, x in joined.items()}


def static_scales(program: Program) -> dict[str, tuple[float, int | None, list]]:
    """Scale, zero point and block of every linear's input."""
    found = {}
    for path, node in by_path(program).items():
        _, scale, zero, block = node.args[0].args[:4]
        value = program.constant(scale)
        assert value.numel() == 1
        assert value.dtype == torch.float32
        number = None if zero is None else int(program.constant(zero))
        found[path] = (float(value), number, list(block))
    return found


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_static_scales_are_those_computed_by_hand(symmetric):
    program, model = canonical_program("bert"), zoo_model("bert").model
    batches = [bert_batch(3, 9, 0), bert_batch(2, 6, 1), bert_batch(1, 4, 2)]
    samples = [as_sample(program, batch) for batch in batches]
    options = ActivationOptions(granularity="tensor", symmetric=symmetric)
    after = apply(program, samples, activations=options)
    ranges, found = eager_ranges(model, batches), static_scales(after)
    assert set(found) == set(ranges)
    assert len(found) == 13
    for path, (low, high) in ranges.items():
        scale, zero, block = found[path]
        assert block == [-1] * len(block)
        if symmetric:
            assert zero is None
            assert scale == pytest.approx(max(abs(low), abs(high)) / 127, rel=1e-4)
            continue
        low, high = min(low, 0.0), max(high, 0.0)
        assert scale == pytest.approx((high - low) / 255, rel=1e-4)
        assert abs(zero - (-128 - float(np.round(low / scale)))) <= 1
    assert "calibration" not in str(after.history[-1].refusals)


def test_static_activations_do_not_leave_the_calibrated_range():
    program = canonical_program("bert")
    after = apply(program, [as_sample(program, bert_batch(3, 9, 0))], activations=TENSOR)
    assert not after.nodes(ops.choose_qparams.default)
    for node in after.nodes(ops.quantize.default):
        assert node.args[4:] == (torch.int8, -128, 127)


def with_outlier(program: Program) -> Program:
    """Token 98 has an embedding like no other."""
    changed = program.clone()
    (name,) = [
        n
        for n in program.weights()
        if n.endswith(("word_embeddings.weight", "embed_tokens.weight"))
    ]
    table = changed.weight(name).clone()
    table[98] = 1e4 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    changed.set_weight(name, table)
    return changed


@pytest.mark.parametrize("model", ["bert", "opt"])
def test_padding_is_never_observed(model):
    """OPT flattens its tokens in front of the feed-forward block."""
    program = with_outlier(canonical_program(model))
    clean = bert_batch(3, 9, 0)
    dirty = {**clean, "input_ids": clean["input_ids"].clone()}
    dirty["input_ids"][clean["attention_mask"] == 0] = 98

    def scales(batch):
        sample = as_sample(program, batch)
        return static_scales(apply(program, [sample], activations=TENSOR))

    assert scales(clean) == scales(dirty)
    unmasked = {**dirty, "attention_mask": torch.ones_like(clean["attention_mask"])}
    assert scales(unmasked) != scales(clean)


class Wide(nn.Module):
    """Two linears on whatever comes in."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_statistics_are_per_channel_over_real_tokens_of_all_batches():
    program = captured(Wide(), torch.randn(2, 3, 8))
    first, second = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    tokens = torch.tensor([[True, True, True], [True, False, False]])
    first[1, 1:] = 1e30
    samples = [Sample([first], tokens), Sample([second])]
    statistics = collect(program, linear_inputs(program), samples)
    rows = torch.cat([first[tokens], second.reshape(-1, 8)])
    name = program.nodes(aten.linear.default)[0].args[0].name
    assert torch.equal(statistics["minimum"][name], rows.amin(0))
    assert torch.equal(statistics["maximum"][name], rows.amax(0))
    assert int(statistics["tokens"][name]) == len(rows)
    assert set(statistics["minimum"]) == {n.name for n in linear_inputs(program)}


def test_pooled_rows_are_not_taken_for_tokens():
    """A classifier's input is [batch, width]; the mask is [batch, length] of the same shape."""
    pooled = torch.randn(2, 8)
    tokens = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    assert torch.equal(real_rows(pooled, tokens), pooled)


def test_flattened_tokens_are_told_from_padding():
    value = torch.randn(6, 8)
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(real_rows(value, tokens), value[[0, 1, 3]])


def test_an_activation_that_was_always_zero_has_no_range():
    """An expert that no token was sent to runs on zeros."""

    class Gated(Wide):
        def forward(self, x):
            return self.first(x) + self.second(torch.where(x > 1e3, x, 0.0))

    program = captured(Gated(), torch.randn(2, 3, 8))
    with pytest.raises(CalibrationError, match="was zero for all of the calibration data"):
        apply(program, [Sample([torch.randn(2, 3, 8)])], activations=TENSOR)


def test_missing_calibration_leaves_the_program_as_it_was():
    program = canonical_program("bert")
    text, weights = signature_of(program), dict(program.weights())
    with pytest.raises(CalibrationError, match=r"'quantize' needs calibration data.*calibration="):
        apply(program, activations=TENSOR)
    assert signature_of(program) == text
    assert {n: id(t) for n, t in program.weights().items()} == {
        n: id(t) for n, t in weights.items()
    }


def test_calibration_without_real_tokens_is_refused():
    program = canonical_program("bert")
    batch = bert_batch(1, 4, 0)
    empty = Sample(as_sample(program, batch).inputs, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="its 1 batches are padding alone"):
        apply(program, [empty], activations=TENSOR)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    program = captured(Wide(), torch.randn(2, 3, 8))
    x = torch.randn(2, 3, 8)
    x[1, 2, 3] = bad
    with pytest.raises(CalibrationError, match="to NaN or infinity. Check the data"):
        apply(program, [Sample([torch.randn(2, 3, 8)]), Sample([x])], activations=TENSOR)
    # The same value on padding is no reason to refuse.
    tokens = torch.ones(2, 3, dtype=torch.bool)
    tokens[1, 2] = False
    apply(program, [Sample([x], tokens)], activations=TENSOR)


# --- dtypes ---------------------------------------------------------------------------------


@cache
def half_precision_program() -> Program:
    torch.manual_seed(0)
    model = ZOO["bert"]().eval()
    randomize(model)
    program = capture_program(model.to(torch.bfloat16))
    return manager().run(program, [Canonicalize()])


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_bf16_models_keep_bf16_activations_and_float32_scales(granularity):
    before = half_precision_program().clone()
    options = ActivationOptions(granularity=granularity, symmetric=False)
    samples = [as_sample(before, bert_batch(2, 6, 0))]
    after = apply(before, samples, activations=options, embeddings=EMBEDDINGS)
    assert len(after.history[-1].sites) == 16
    for node in after.nodes(aten.linear.default):
        assert node.meta["val"].dtype == torch.bfloat16
        assert [a.meta["val"].dtype for a in node.args[:2]] == [torch.bfloat16] * 2
        _, scale, _, _ = stored(after, node, 1)
        assert scale.dtype == torch.float32
        assert node.args[0].args[1].meta["val"].dtype == torch.float32
    for node in after.nodes(aten.embedding.default):
        assert node.meta["val"].dtype == torch.bfloat16
    inputs = as_sample(before, bert_batch(2, 6, 3)).inputs
    with torch.no_grad():
        old = before.graph_module(*inputs)[0]
        new = after.graph_module(*inputs)[0]
    assert new.dtype == torch.bfloat16
    error = (new.float() - old.float()).norm() / old.float().norm()
    assert 1e-4 < float(error) < 0.1


# --- quality --------------------------------------------------------------------------------


def test_finer_granularity_and_more_bits_of_range_cost_less():
    program = canonical_program("llama")
    verifier = Verifier(program.examples[:1])

    def decibels(**options) -> float:
        done = Manager(verifier).run(program, [Quantize(**options)])
        return done.history[-1].verification["sqnr_db"]

    tensor, channel, group = (
        decibels(weights=WeightOptions("int8", granularity, size))
        for granularity, size in (("tensor", None), ("channel", None), ("group", 8))
    )
    assert tensor < channel < group
    assert decibels(activations=TOKEN) < channel


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wieghts": {}}, "Did you mean 'weights'"),
        ({"weights": {"granularty": "tensor"}}, "Did you mean 'granularity'"),
        ({"weights": {"granularity": "chanel"}}, "Did you mean 'channel'"),
        ({"weights": {"dtype": "int7"}}, "'int7' is not one of.*'int8'"),
        ({"weights": {"group_size": "32"}}, "group_size"),
        ({"weights": {"granularity": "group"}}, "needs group_size, a positive number"),
        ({"weights": {"granularity": "group", "group_size": 0}}, "group_size, a positive number"),
        ({"weights": {"symmetric": "yes"}}, "symmetric"),
        ({"activations": {"granularity": "channel"}}, "'token'"),
        ({"activations": {"tokens": 1}}, "unknown key"),
        ({"embeddings": {"granularity": "rows"}}, "'channel'"),
        ({"embeddings": {"granularity": "group"}}, "needs group_size"),
        ({"weights": {"granularity": "block", "block_size": [4, 0]}}, "needs block_size"),
        ({"weights": {"granularity": "block", "block_size": [-2, 4]}}, "-1 for the whole axis"),
        ({"weights": {"granularity": "block", "block_size": [4, -2]}}, "-1 for the whole axis"),
        ({"weights": {"block_size": [4, 4]}}, "no meaning at granularity 'channel'"),
        ({"weights": {"dtype": "nf4", "symmetric": False}}, "nf4 has no zero point"),
        ({"activations": {"dtype": "fp8_e4m3", "symmetric": False}}, "has no zero point"),
        ({"activations": {"observer": "mse"}}, "granularity is 'token'"),
        ({"activations": {"granularity": "tensor", "observer": "max"}}, "'minmax'"),
        ({"activations": {"percentile": 40.0}}, "percentile 40.0 is not above 50"),
        ({"activations": {"groups": 0}}, "groups 0 is not a positive number"),
        (
            {"activations": {"dtype": "fp8_e4m3", "granularity": "tensor", "observer": "kl"}},
            "levels of equal width",
        ),
        ({"weights": None}, "nothing to do"),
        ({"include": "lm_head"}, "include"),
        ({"exclude": [1]}, "exclude"),
    ],
)
def test_wrong_options_are_recipe_errors(options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.resolve({"passes": ["canonicalize", {"quantize": options}]})
    assert isinstance(caught.value, fxopt.FxoptError)
    assert "passes[1].quantize" in str(caught.value)


def test_options_of_a_recipe_reach_the_pass():
    options = {
        "weights": {"granularity": "group", "group_size": 16, "symmetric": False},
        "activations": {"granularity": "tensor"},
        "embeddings": {"granularity": "tensor"},
        "include": ["a.*"],
        "exclude": ["b"],
    }
    built = Recipe.resolve({"passes": ["canonicalize", {"quantize": options}]}).build()[1]
    assert built == Quantize(
        WeightOptions("int8", "group", 16, False),
        ActivationOptions("int8", "tensor", True),
        EmbeddingOptions("int8", "tensor"),
        ("a.*",),
        ("b",),
    )
    assert [need.statistic for need in built.needs()] == ["minimum", "maximum"]
    assert Quantize(activations=TOKEN).needs() == ()


# --- observers and groups of embedding dimensions -------------------------------------------


OBSERVERS = ["minmax", "moving_average", "percentile", "mse", "kl"]


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_observer_gives_static_ranges_within_those_seen(observer, symmetric):
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, seed)) for seed in (0, 1)]
    whole = ActivationOptions(granularity="tensor", symmetric=symmetric)
    chosen = ActivationOptions(granularity="tensor", symmetric=symmetric, observer=observer)
    known = static_scales(apply(program, samples, activations=whole))
    after = apply(program, samples, activations=chosen)
    found = static_scales(after)
    assert set(found) == set(known)
    assert all(found[path][0] <= known[path][0] * (1 + 1e-5) for path in known)
    if observer != "minmax":
        assert all(f"({observer} range)" in detail for detail in details(after))


def test_percentile_100_gives_the_scales_of_minmax():
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, 0))]
    all_of_it = ActivationOptions("int8", "tensor", False, "percentile", 100.0)
    found = static_scales(apply(program, samples, activations=all_of_it))
    assert found == static_scales(apply(program, samples, activations=TENSOR))


@pytest.mark.parametrize("observer", ["moving_average", "percentile", "mse", "kl"])
def test_no_observer_sees_padding(observer):
    program = with_outlier(canonical_program("bert"))
    clean = bert_batch(3, 9, 0)
    dirty = {**clean, "input_ids": clean["input_ids"].clone()}
    dirty["input_ids"][clean["attention_mask"] == 0] = 98
    options = ActivationOptions("int8", "tensor", False, observer)
    first, second = (
        static_scales(apply(program, [as_sample(program, batch)], activations=options))
        for batch in (clean, dirty)
    )
    assert first == second


def grouped(groups: int, symmetric: bool = False) -> ActivationOptions:
    return ActivationOptions("int8", "embedding_group", symmetric, groups=groups)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_one_group_is_per_tensor(symmetric):
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, 0))]
    per_tensor = ActivationOptions(granularity="tensor", symmetric=symmetric)
    one = static_parts(apply(program, samples, activations=grouped(1, symmetric)))
    whole = static_parts(apply(program, samples, activations=per_tensor))
    assert set(one) == set(whole)
    for path, (scale, zero, _) in one.items():
        assert torch.equal(scale, whole[path][0])
        assert zero is None if symmetric else torch.equal(zero, whole[path][1])


def static_parts(program: Program) -> dict[str, tuple[Tensor, Tensor | None, list]]:
    """Scales, zero points and block of every linear's input."""
    found = {}
    for path, node in by_path(program).items():
        _, scale, zero, block = node.args[0].args[:4]
        zero = None if zero is None else program.constant(zero)
        found[path] = (program.constant(scale), zero, list(block))
    return found


@cache
def wide_program() -> Program:
    return captured(Wide(), torch.randn(2, 3, 8))


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 3),
    offset=st.floats(-2, 2),
)
def test_no_value_of_a_group_errs_more_than_half_its_step(groups, symmetric, seed, spread, offset):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)) + offset
    x = x * torch.logspace(-spread, spread, 8)
    after = apply(wide_program(), [Sample([x])], activations=grouped(groups, symmetric))
    node = after.nodes(aten.linear.default)[0]
    q, scale, zero, block = node.args[0].args[:4]
    scale, zero = after.constant(scale), None if zero is None else after.constant(zero)
    assert block == [-1, -1, 8 // groups if groups > 1 else -1]
    assert scale.shape == (1, 1, groups)
    parts = x.reshape(6, groups, -1)
    low, high = parts.amin((0, 2)).clamp(max=0), parts.amax((0, 2)).clamp(min=0)
    steps = torch.maximum(high, -low) / 127 if symmetric else (high - low) / 255
    assert torch.allclose(scale.flatten(), steps)  # groups = 8: per embedding dimension
    codes = ops.quantize(x, scale, zero, block, *q.args[4:])
    error = (ops.dequantize(codes, scale, zero, block, torch.float32) - x).abs()
    assert bool((error.reshape(6, groups, -1) <= scale.reshape(1, -1, 1) * 0.5001).all())


def test_groups_that_do_not_divide_are_refused_site_by_site():
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, 0))]
    with pytest.warns(UserWarning, match="5 groups do not divide its 32 inputs"):
        after = manager(samples).run(program, [Quantize(activations=grouped(5))])
    assert signature_of(after) == signature_of(program)


def test_what_a_recipe_says_nothing_of_is_no_refusal():
    program = canonical_program("bert")
    result = Quantize(weights=None, embeddings=EmbeddingOptions()).run(program, Context())
    assert result.sites
    assert not any("floating point" in refusal.reason for refusal in result.refusals)
    linears = program.nodes(torch.ops.aten.linear.default)
    assert all(node.args[1].op == "get_attr" for node in linears)


class Both(nn.Module):
    """Two linears that read one norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.first(x), self.second(x)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "other",
    [
        ActivationOptions("int4", "tensor"),
        ActivationOptions("int8", "embedding_group", groups=4),
        ActivationOptions("int8", "tensor", symmetric=False),
    ],
    ids=["bits", "groups", "asymmetric"],
)
def test_linears_of_one_input_that_two_passes_round_keep_their_own_scales(other, order):
    torch.manual_seed(0)
    program, samples = captured(Both(), torch.randn(2, 3, 8)), [Sample([torch.randn(4, 5, 8)])]
    passes = [
        Quantize(activations=TENSOR, include=("first",)),
        Quantize(activations=other, include=("second",)),
    ]
    after = manager(samples).run(program, [passes[index] for index in order])
    first, second = run(after, samples[0].inputs)
    assert torch.equal(first, run(manager(samples).run(program, passes[:1]), samples[0].inputs)[0])
    assert torch.equal(second, run(manager(samples).run(program, passes[1:]), samples[0].inputs)[1])


def test_linears_of_one_input_that_one_pass_rounds_share_a_scale():
    program, samples = captured(Both(), torch.randn(2, 3, 8)), [Sample([torch.randn(4, 5, 8)])]
    after = apply(program, samples, activations=TENSOR)
    first, second = (node.args[0].args[1] for node in after.nodes(aten.linear.default))
    assert first.target == second.target
