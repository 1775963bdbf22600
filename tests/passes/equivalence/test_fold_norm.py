"""Norm folding: gains end in the linears behind, means are dropped where nothing reads them."""

import pytest
import torch

from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.untie import Untie
from tests.passes.equivalence.harness import canonical, changed, idempotent, refusals, run, sites

aten = torch.ops.aten


def test_every_gain_of_an_untied_llama_folds():
    before = canonical("llama")
    after = run(before, FoldNorm())
    assert len(sites(after)) == 5
    assert refusals(after) == ""
    gains = {name for name in before.weights() if name.endswith("norm.weight")}
    assert gains <= changed(before, after)
    assert all(bool((after.weight(name) == 1).all()) for name in gains)
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    rest = changed(before, after) - gains
    assert all(any(part in name for part in readers) for name in rest)
    assert len(rest) == 11
    idempotent(after, FoldNorm())


def test_a_tied_head_keeps_the_last_gain():
    before = canonical("tied-llama")
    after = run(before, FoldNorm())
    assert len(sites(after)) == 4
    assert "model.norm: a norm measures all of it together" in refusals(after)
    assert "model.embed_tokens.weight" not in changed(before, after)
    untied = run(before, Untie(), FoldNorm())
    assert len(sites(untied)) == 5


def test_a_gain_of_one_plus_w_becomes_zero():
    """The documented failure of other tools: Gemma's norm multiplies by 1 + w."""
    before = canonical("gemma3")
    after = run(before, FoldNorm())
    folded = {path for path in sites(after) if "input_layernorm" in path}
    assert len(folded) == 3
    for path in folded:
        assert bool((after.weight(f"{path}.weight") == 0).all())


@pytest.mark.parametrize("model", ["gemma3", "qwen3"])
def test_the_norms_of_queries_and_keys_stay(model):
    after = run(canonical(model), FoldNorm())
    assert not any("q_norm" in path or "k_norm" in path for path in sites(after))
    for own, other in (("q_norm", "k_norm"), ("k_norm", "q_norm")):
        reason = f"no linear reads it: model.layers.0.self_attn.{other}.weight would take it up"
        assert f"model.layers.0.self_attn.{own}: {reason}" in refusals(after)


def test_a_norm_behind_the_block_is_read_by_the_residual():
    """Post-norm: what norm -> q/k/v would fold is also added to the stream."""
    before = canonical("bert")
    after = run(before, FoldNorm(centre=True))
    assert all("embeddings.LayerNorm" in path or "embeddings" in path for path in sites(after))
    assert "encoder.layer.0.output.LayerNorm" in refusals(after)
    assert "a norm measures all of it together" in refusals(after)


def test_experts_and_their_router_take_a_gain_up():
    before = canonical("mixtral")
    after = run(before, FoldNorm())
    assert len(sites(after)) == 5
    names = changed(before, after)
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert any(name.endswith("mlp.gate.weight") for name in names)
    assert not any(name.endswith("down_proj") for name in names)


def test_layer_norms_become_rms_norms_where_writers_can_be_centred():
    before = canonical("gptneox")
    after = run(before, FoldNorm(centre=True))
    assert not after.nodes(aten.layer_norm.default)
    assert len(after.nodes(aten.rms_norm.default)) == len(before.nodes(aten.layer_norm.default))


def test_a_tied_table_cannot_be_centred():
    before = canonical("gpt2")
    after = run(before, FoldNorm(centre=True))
    assert len(after.nodes(aten.layer_norm.default)) == 5
    table = "transformer.wte.weight"
    why = f"its mean has to stay: a linear reads {table} by its columns; run untie first"
    for name in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"):
        assert f"transformer.{name}: {why}" in refusals(after)
    assert "transformer.wte.weight" not in changed(before, after)
    untied = run(before, Untie(), FoldNorm(centre=True))
    assert not untied.nodes(aten.layer_norm.default)
