"""What the analysis finds on tiny models, and how it reads."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import symmetries
from tests.passes.equivalence.harness import canonical, plain

COUNTS = {
    # q/k, v -> o, then norm -> linears and up -> down
    ("llama", Kind.SCALE): {"query_key": 2, "value": 2, "hidden": 7},
    ("llama", Kind.PERMUTE): {"query_key": 2, "value": 2, "hidden": 2, "residual": 1},
    ("llama", Kind.ROTATE): {"query_key": 2, "value": 2},
    ("tied-llama", Kind.SCALE): {"query_key": 2, "value": 2, "hidden": 6},
    ("tied-llama", Kind.PERMUTE): {"query_key": 2, "value": 2, "hidden": 2, "residual": 1},
    ("bert", Kind.SCALE): {"query_key": 2, "value": 2},
    ("bert", Kind.PERMUTE): {"query_key": 2, "value": 2, "hidden": 2},
    ("gpt2", Kind.SCALE): {"query_key": 2, "value": 2, "hidden": 4},
    ("gpt2", Kind.ROTATE): {"query_key": 2, "value": 2},
    ("mixtral", Kind.PERMUTE): {"query_key": 2, "value": 2, "hidden": 2, "residual": 1},
    ("gptneox", Kind.CENTRE): {"residual": 1},
}


@pytest.mark.parametrize(("model", "kind"), COUNTS, ids=str)
def test_counts(model, kind):
    found = symmetries(canonical(model), kind)
    assert Counter(symmetry.role for symmetry in found) == COUNTS[model, kind]


REASONS = [
    ("bert", Kind.SCALE, "intermediate.dense.weight", "a nonlinear function reads it"),
    ("bert", Kind.SCALE, "output.LayerNorm.weight", "a norm measures all of it together"),
    ("bert", Kind.PERMUTE, "word_embeddings", "it is the model's output 'last_hidden_state'"),
    ("bert", Kind.ROTATE, "word_embeddings", "layer_norm subtracts a mean"),
    ("llama", Kind.ROTATE, "up_proj", "it is multiplied channel by channel"),
    ("llama", Kind.ROTATE, "embed_tokens", "run fold-norm first"),
    ("llama", Kind.CENTRE, "embed_tokens", "rms_norm reads the mean"),
    ("tied-llama", Kind.SCALE, "embed_tokens", "a norm measures all of it together"),
]


@pytest.mark.parametrize(("model", "kind", "site", "reason"), REASONS)
def test_refusals_say_why(model, kind, site, reason):
    refused = symmetries(canonical(model), kind).refusals
    assert any(site in r.site and reason in r.reason for r in refused), refused


def test_it_reads_as_which_parameters_move_together():
    text = str(symmetries(canonical("llama"), Kind.SCALE))
    assert text.startswith("scale by channel: 11 symmetries\n")
    assert (
        "hidden (64): model.layers.0.mlp.up_proj.weight[0], /model.layers.0.mlp.down_proj.weight[1]"
    ) in text
    assert "\nrefused: 1\n  model.embed_tokens.weight, " in text
    heads = str(symmetries(canonical("llama"), Kind.PERMUTE, Unit.HEAD))
    assert "heads (2 x 2): model.layers.0.self_attn.q_proj.weight[0] x8, " in heads


class Tied(nn.Module):
    """One matrix writes an axis and reads another: what one multiplies the other divides."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.mix(x) if self.between else x + self.mix(x)
        return nn.functional.linear(x, self.table.weight)


def test_edits_of_a_tied_weight_that_disagree_void_the_scale():
    ids = torch.randint(0, 9, (2, 5))
    found = symmetries(plain(Tied(between=False), ids), Kind.SCALE)
    assert len(found) == 0
    assert any(
        "table.weight" in r.site
        and "what one use multiplies, another would have to divide" in r.reason
        for r in found.refusals
    )
    (other,) = symmetries(plain(Tied(between=True), ids), Kind.SCALE)
    assert {edit.name for edit in other.weights} == {"table.weight", "mix.weight", "mix.bias"}
