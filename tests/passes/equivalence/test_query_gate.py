"""Attention whose queries and output gate come out of one linear, per head [q_h | gate_h].

    y = o(attention(q, k, v) * sigmoid(gate))

Qwen3-Next has it. A tool that takes its rows for queries scales, turns or moves the gate with them.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxopt.ir.program import Program
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.equalize import Equalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from tests.models import randomize
from tests.passes.equivalence.harness import details, plain, refusals, run, sites
from tests.zoo import OffsetRmsNorm, rotary_table, rotate_half

WIDTH, HEADS, GROUPS, HEAD, ROTARY, VOCABULARY = 16, 4, 2, 8, 4, 9


class GatedAttention(nn.Module):
    """Tokens to logits; norms multiply by 1 + w, half of a head's channels turn."""

    def __init__(self, query_key_norm: bool) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.norm, self.last_norm = OffsetRmsNorm(WIDTH), OffsetRmsNorm(WIDTH)
        self.q_and_gate = nn.Linear(WIDTH, HEADS * 2 * HEAD)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * HEAD) for _ in range(2))
        self.q_norm, self.k_norm = (
            OffsetRmsNorm(HEAD) if query_key_norm else nn.Identity() for _ in range(2)
        )
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = rotary_table(torch.arange(x.shape[2]), ROTARY, interleaved=False)
        part, rest = x[..., :ROTARY], x[..., ROTARY:]
        return torch.cat((part * cos + rotate_half(part) * sin, rest), -1)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embed(ids)
        x = self.norm(stream)
        q, gate = self.q_and_gate(x).unflatten(-1, (HEADS, 2 * HEAD)).chunk(2, -1)
        k, v = (y.unflatten(-1, (GROUPS, HEAD)) for y in (self.k(x), self.v(x)))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        y = functional.scaled_dot_product_attention(
            self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True
        )
        y = y.transpose(1, 2).flatten(-2) * torch.sigmoid(gate.flatten(-2))
        return self.unembed(self.last_norm(stream + self.o(y)))


@cache
def program(query_key_norm: bool = False) -> Program:
    torch.manual_seed(0)
    model = GatedAttention(query_key_norm)
    randomize(model)
    return plain(model, torch.randint(0, VOCABULARY, (2, 5)))


def rows_that_changed(before: Program, after: Program) -> tuple[Tensor, Tensor]:
    """Which rows [heads, channels] of the fused linear are new: those of queries, of gates."""
    name = "q_and_gate.weight"
    new = (before.weight(name) != after.weight(name)).any(1).reshape(HEADS, 2, HEAD)
    return new[:, 0], new[:, 1]


STREAM_READERS = "the gain of a norm stands in the way"
GATED_VALUES = "it is multiplied channel by channel"
FOLDED = (FoldNorm(),)
# The passes, where the last one finds its sites, and a reason that it gives.
EVERY_PASS = [
    ((Untie(),), [], ""),
    ((FoldNorm(),), ["norm", "last_norm"], "no linear reads it: q_norm.weight would take it up"),
    (
        (Equalize(),),
        ["norm", "q_norm", "q_norm", "v", "last_norm"],
        "a norm measures all of it together",
    ),
    ((AwqScale(ratio=0.5),), ["norm", "v", "last_norm"], ""),
    ((SmoothQuant(),), ["last_norm", "v", "norm"], ""),
    ((PermuteFfn(by="random"),), [], ""),
    ((PermuteVo(by="random"),), ["q_and_gate"], ""),
    ((PermuteQk(by="random"),), ["q_and_gate"] * 2, ""),
    ((PermuteHeads(by="random"),), ["q_and_gate"] * 2, ""),
    ((PermuteQk(by="random"), PermuteHeads(by="random")), ["q_and_gate"] * 2, ""),
    ((PermuteResidual(by="random"),), ["embed"], ""),
    ((Rotate(online=False),), [], STREAM_READERS),
    ((*FOLDED, Rotate(online=False)), ["embed"], GATED_VALUES),
    ((*FOLDED, Rotate(keys=True)), ["embed", "o", ""], GATED_VALUES),
]


@pytest.mark.parametrize(("passes", "places", "reason"), EVERY_PASS)
def test_every_pass_is_right_or_says_why_not(passes, places, reason):
    """The harness compares in float64 to 1e-9."""
    after = run(program(query_key_norm=True), *passes)
    assert sorted(sites(after)) == sorted(places)
    assert reason in refusals(after)


@pytest.mark.parametrize("query_key_norm", [False, True])
def test_queries_move_without_the_gate(query_key_norm):
    before = program(query_key_norm)
    queries, gates = rows_that_changed(before, run(before, PermuteQk(by="random")))
    assert queries.any()
    assert not gates.any()


def test_the_gate_moves_with_the_values_and_without_the_queries():
    before = program()
    after = run(before, PermuteVo(by="random"))
    queries, gates = rows_that_changed(before, after)
    assert gates.any()
    assert not queries.any()
    moved = "q_and_gate.weight, q_and_gate.bias, v.weight, v.bias, o.weight"
    assert details(after) == [f"2 blocks of 8 value coordinates reordered: {moved}"]


def test_a_head_takes_its_gate_along():
    before = program()
    queries, gates = rows_that_changed(before, run(before, PermuteHeads(by="random")))
    assert queries.any()
    assert torch.equal(queries, gates)


def test_a_factor_of_queries_or_values_leaves_the_gate_alone():
    """Without norms of queries q and k share factors, one for each pair that turns."""
    before = program()
    after = run(before, FoldNorm(), Equalize())
    assert {"q_and_gate", "v"} <= set(sites(after))
    rows = before.weight("q_and_gate.bias").reshape(HEADS, 2, HEAD)
    new = after.weight("q_and_gate.bias").reshape(HEADS, 2, HEAD)
    assert not torch.allclose(new[:, 0], rows[:, 0])
    assert torch.equal(new[:, 1], rows[:, 1])
