"""Channels of values in another order."""

import pytest

from fxopt.passes.equivalence.permute_vo import PermuteVo
from tests.passes.equivalence.harness import canonical, changed, idempotent, run, sites

MODELS = {
    "llama": ("v_proj.weight", "o_proj.weight"),
    "gpt2": ("c_attn.weight", "c_attn.bias", "attn.c_proj.weight"),
    "gptneox": ("query_key_value.weight", "query_key_value.bias", "attention.dense.weight"),
    "phi3": ("qkv_proj.weight", "o_proj.weight"),
    "bert": ("value.weight", "value.bias", "attention.output.dense.weight"),
    "t5": ("v.weight", "o.weight"),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_attention_has_its_site(model):
    before = canonical(model)
    after = run(before, PermuteVo(by="random"))
    assert len(sites(after)) == (6 if model == "t5" else 2)
    names = changed(before, after)
    assert all(name.endswith(MODELS[model]) for name in names)
    assert len(names) == len(sites(after)) * len(MODELS[model])
    has_cache = before.signature.cache is not None
    assert bool(after.history[-1].notes) == has_cache


def test_sorting_twice_is_sorting_once():
    idempotent(run(canonical("llama"), PermuteVo()), PermuteVo())
