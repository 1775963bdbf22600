"""Tied weights get copies of their own."""

import torch

from fxopt.passes.equivalence.untie import Untie
from tests.passes.equivalence.harness import canonical, run, sites


def test_a_tied_head_gets_its_own_table():
    before = canonical("tied-llama")
    after = run(before, Untie())
    assert sites(after) == ["lm_head"]
    table = after.weight("model.embed_tokens.weight")
    assert torch.equal(after.weight("lm_head.weight"), table)
    assert after.weight("lm_head.weight").data_ptr() != table.data_ptr()
    assert after.byte_count() == before.byte_count() + table.nbytes
    assert "lm_head.weight" not in after.aliases


def test_what_is_not_tied_stays():
    before = canonical("llama")
    after = run(before, Untie())
    assert not sites(after)
    assert after.byte_count() == before.byte_count()
