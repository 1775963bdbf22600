"""What the analysis finds in the two real models, counted; no name of a layer decides it."""

from collections import Counter

import pytest

from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.ir.program import Program
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier
from tests.real_models import minilm_program, smollm2_program

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2() -> Program:
    return smollm2_program()


@pytest.fixture(scope="module")
def minilm() -> Program:
    return minilm_program()


def feeds_linears(program: Program, symmetry: Symmetry) -> bool:
    return any(edit.inverse and edit.axes == (1,) for edit in symmetry.weights)


def roles(found: Symmetries) -> Counter:
    return Counter((s.role, s.blocks, s.size) for s in found)


def test_scales_of_smollm2(smollm2):
    found = symmetries(smollm2, Kind.SCALE)
    assert sum(feeds_linears(smollm2, symmetry) for symmetry in found) == 120
    assert roles(found) == {
        ("hidden", 1, 576): 60,  # norm -> q, k, v and norm -> gate, up
        ("value", 1, 192): 30,  # v -> o, tied over the query heads of a kv head
        ("hidden", 1, 1536): 30,  # up -> down
        ("query_key", 1, 96): 30,  # one factor per rotation pair and kv head
    }
    tied = found.reason("model.norm.weight")
    assert "a norm measures all of it together" in tied  # the head is the embedding


def test_permutations_of_smollm2(smollm2):
    found = roles(symmetries(smollm2, Kind.PERMUTE))
    assert found == {
        ("hidden", 1, 1536): 30,
        ("value", 3, 64): 30,
        ("query_key", 3, 32): 30,
        ("residual", 1, 576): 1,
    }
    heads = symmetries(smollm2, Kind.PERMUTE, Unit.HEAD).of_role("heads")
    groups = symmetries(smollm2, Kind.PERMUTE, Unit.GROUP).of_role("heads")
    assert [(s.blocks, s.size) for s in heads] == [(3, 3)] * 30
    assert [(s.blocks, s.size) for s in groups] == [(1, 3)] * 30


def test_scales_of_minilm(minilm):
    found = symmetries(minilm, Kind.SCALE)
    assert roles(found) == {("value", 1, 384): 6, ("query_key", 1, 384): 6}
    norm = "encoder.layer.0.attention.output.LayerNorm.weight"
    assert found.reason(norm).startswith("a norm measures all of it together")


def test_permutations_of_minilm(minilm):
    found = symmetries(minilm, Kind.PERMUTE)
    assert roles(found) == {
        ("hidden", 1, 1536): 6,
        ("value", 12, 32): 6,
        ("query_key", 12, 32): 6,
    }
    assert "last_hidden_state" in found.reason("embeddings.word_embeddings.weight", 1)
    heads = symmetries(minilm, Kind.PERMUTE, Unit.HEAD).of_role("heads")
    assert [(s.blocks, s.size) for s in heads] == [(1, 12)] * 6


def test_the_residual_of_minilm_moves_when_it_is_restored(minilm):
    inputs = minilm.examples[:1]
    passes = ["canonicalize", {"permute-residual": {"by": "random", "restore_output": True}}]
    built = Recipe.resolve(passes).build()[1:]
    moved = Manager(Verifier(inputs)).run(minilm, built)
    assert len(moved.history[-1].sites) == 1
    refused = Recipe.resolve(["canonicalize", "permute-residual"]).build()[1:]
    with pytest.warns(UserWarning, match="last_hidden_state"):
        Manager(Verifier(inputs)).run(minilm, refused)
