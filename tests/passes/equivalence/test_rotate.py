"""Rotations: R1 and R2 in weights, R3 and R4 at run time."""

import pytest
import torch

from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.online_rotation import block_order
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.untie import Untie
from tests.passes.equivalence.harness import canonical, changed, details, refusals, run, sites

READY = (Untie(), FoldNorm(centre=True))


def kinds(program) -> list[str]:
    return sorted(detail[:2] for detail in details(program))


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3", "gpt2", "tied-llama", "gptneox"])
def test_a_decoder_rotates_its_stream_and_its_values(model):
    after = run(canonical(model), *READY, Rotate(online=False))
    assert kinds(after) == ["R1", "R2", "R2"]
    assert after.history[-1].notes  # the cache holds rotated values


def test_what_weights_cannot_turn_is_turned_at_run_time():
    after = run(canonical("llama"), *READY, Rotate())
    assert kinds(after) == ["R1", "R2", "R2", "R4", "R4"]
    assert len(after.nodes(torch.ops.fxopt.hadamard.default)) == 2


def test_keys_turn_behind_rotary_embedding():
    after = run(canonical("llama"), Rotate(residual=False, values=False, online=False, keys=True))
    assert kinds(after) == ["R3", "R3"]
    assert len(after.nodes(torch.ops.fxopt.hadamard.default)) == 4  # queries and keys
    assert not after.history[-1].refusals  # of what was not asked for


def test_a_gain_that_is_not_folded_stands_in_the_way():
    before = canonical("llama")
    after = run(before, Rotate(online=False))
    assert kinds(after) == ["R2", "R2"]
    assert "run fold-norm first" in refusals(after)
    assert "model.embed_tokens.weight" not in changed(before, after)


def test_a_layer_norm_has_to_be_centred():
    after = run(canonical("gpt2"), Untie(), FoldNorm(), Rotate(online=False))
    assert kinds(after) == ["R2", "R2"]
    assert "subtracts a mean" in refusals(after)


def test_gates_refuse_and_turns_of_rotary_pairs_are_left_alone():
    after = run(canonical("llama"), *READY, Rotate(online=False))
    assert "multiplied channel by channel" in refusals(after)
    assert not any("q_proj" in site for site in sites(after))


def test_a_second_rotation_is_refused():
    once = run(canonical("llama"), *READY, Rotate())
    twice = run(once, Rotate())
    assert not sites(twice)
    assert "rotated already" in refusals(twice)


@pytest.mark.parametrize(("width", "order"), [(576, 576), (1536, 1536), (34, 2), (7, None)])
def test_the_largest_order_that_fits(width, order):
    assert block_order(width) == order
