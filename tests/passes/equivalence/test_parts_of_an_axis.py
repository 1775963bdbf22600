"""Operators that see a part of an axis, weights that stand at several places, norms called twice.

`run` compares every program in float64 with what it was.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import symmetries
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.models import randomize
from tests.passes.equivalence.harness import canonical, details, plain, refusals, run, sites
from tests.zoo import GROUPED, hf

WIDTH, HIDDEN = 8, 16


def program(module: nn.Module):
    torch.manual_seed(0)
    randomize(module)
    return plain(module, torch.randn(2, 5, WIDTH))


# --- part of an axis ------------------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], copies: int = 1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN * copies, WIDTH)
        self.between = between
        self.register_buffer("order", torch.randperm(HIDDEN * copies))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x), self.order))


def half_activated(x: Tensor, order: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((functional.silu(first), second), -1)


def half_scaled(x: Tensor, order: Tensor) -> Tensor:
    first, second = functional.gelu(x).chunk(2, -1)
    return torch.cat((2 * first, second), -1)


def both_signs(x: Tensor, order: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    relu = functional.relu
    return torch.cat((relu(a), relu(-a), relu(-b), relu(b)), -1)


def two_functions(x: Tensor, order: Tensor) -> Tensor:
    both = torch.cat((functional.relu(x), functional.gelu(x)), -1)
    return both.index_select(-1, order)


FORMS = {
    "half_activated": (half_activated, 1, 2),
    "half_scaled": (half_scaled, 1, 2),
    "both_signs": (both_signs, 2, 2),
    "two_functions": (two_functions, 2, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_hidden_units_change_places_with_their_like(form):
    between, copies, count = FORMS[form]
    torch.manual_seed(0)
    after = run(program(FeedForward(between, copies)), PermuteFfn(by="random"))
    assert sites(after) == ["up"] * count
    assert all(f"{HIDDEN // count} hidden" in detail for detail in details(after))


class Stream(nn.Module):
    """A residual stream of which one half is doubled."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = torch.cat((2 * h[..., : WIDTH // 2], h[..., WIDTH // 2 :]), -1)
        h = h + self.mix(self.norm(h))
        return self.head(self.norm(h))


@pytest.mark.parametrize("by", ["permute", "rotate"])
def test_a_stream_of_which_a_part_is_scaled_changes_in_parts(by):
    passes = {
        "permute": [PermuteResidual(by="random")],
        "rotate": [FoldNorm(), Rotate(online=False)],
    }
    after = run(program(Stream(nn.RMSNorm(WIDTH))), *passes[by])
    assert len(sites(after)) == 2


def test_the_mean_of_a_stream_of_which_a_part_is_scaled_stays():
    after = run(program(Stream(nn.LayerNorm(WIDTH))), FoldNorm(centre=True))
    assert "one of the norms reads a part of the stream" in refusals(after)
    assert len(list(after.nodes(torch.ops.aten.layer_norm.default))) == 2


class HalfOfTheHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (4, 2)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v)
        y = torch.cat((functional.gelu(y[:, :2]), y[:, 2:]), 1)
        return self.o(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    ("a_pass", "count"),
    [
        (PermuteVo(by="random"), 2),
        (PermuteQk(by="random"), 1),
        (PermuteHeads(by="random"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_heads_with_an_activation_change_places_among_themselves(a_pass, count):
    assert len(sites(run(program(HalfOfTheHeads()), a_pass))) == count


# --- one tensor, one key, one gain at several places ----------------------------------------------


class Attention(nn.Module):
    """q, k and v in one weight without a bias; the keys may be the values too."""

    def __init__(self, keys_are_values: bool = False) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.keys_are_values = keys_are_values

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, k if self.keys_are_values else v)
        return self.o(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("kind", [Kind.PERMUTE, Kind.ROTATE, Kind.SCALE])
def test_queries_and_keys_of_one_weight_are_an_axis(kind):
    found = symmetries(program(Attention()), kind)
    assert Counter(symmetry.role for symmetry in found) == {"query_key": 1, "value": 1}
    (query_key,) = found.of_role("query_key")
    assert {edit.name for edit in query_key.edits} == {"qkv.weight"}
    assert len(sites(run(program(Attention()), PermuteQk(by="random")))) == 1


def test_keys_that_are_values_too_are_not_rotated_at_run_time():
    after = run(
        program(Attention(keys_are_values=True)),
        Rotate(residual=False, values=False, online=False, keys=True),
    )
    assert sites(after) == []
    assert "its keys are read elsewhere too" in refusals(after)


def test_keys_that_two_attentions_read_are_rotated_once():
    torch.manual_seed(0)
    model = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**GROUPED)).eval()
    randomize(model)
    before = Manager(Verifier((), mode="off")).run(fxopt.capture(model), [Canonicalize()])
    attentions = len(list(before.nodes(torch.ops.fxopt.attention.default)))
    after = run(before, Rotate(residual=False, values=False, online=False, keys=True))
    assert attentions == 2 * GROUPED["num_hidden_layers"]
    assert len(sites(after)) == attentions
    keys = {node.args[1] for node in after.nodes(torch.ops.fxopt.attention.default)}
    spun = list(after.nodes(torch.ops.fxopt.hadamard.default))
    assert len(spun) == attentions + len(keys)


class SharedNorm(nn.Module):
    """A norm that is called twice; behind its second call there may be something nonlinear."""

    def __init__(self, nonlinear: bool) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.nonlinear = nonlinear

    def forward(self, x: Tensor) -> Tensor:
        second = self.norm(x * x)
        return self.a(self.norm(x)) + self.b(second.relu() if self.nonlinear else second)


@pytest.mark.parametrize(
    ("nonlinear", "negative", "folds"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_the_gain_of_a_norm_that_is_called_twice_is_folded_once(nonlinear, negative, folds):
    module = SharedNorm(nonlinear)
    randomize(module)
    gain = torch.linspace(0.5, 1.5, WIDTH)
    module.norm.weight.data = -gain if negative else gain
    after = run(plain(module, torch.randn(2, 5, WIDTH)), FoldNorm())
    assert sites(after) == (["norm"] if folds else [])
    if not folds:
        assert "negative and something nonlinear lies behind it" in refusals(after)


def test_a_cache_that_holds_a_norm_takes_up_its_gain():
    """The latent of DeepSeek's attention is cached behind its norm."""
    after = run(canonical("deepseekv3"), FoldNorm())
    assert any("kv_a_layernorm" in site for site in sites(after))
    assert any("caches made by the original no longer fit" in n for n in after.history[-1].notes)


# --- what is no hidden axis -----------------------------------------------------------------------


def test_the_tokens_of_a_table_of_positions_are_no_hidden_axis():
    found = symmetries(canonical("vit"), Kind.PERMUTE, Unit.HEAD)
    assert len(found.of_role("heads")) == 2
    after = run(canonical("vit"), PermuteResidual(by="random", restore_output=True))
    assert len(sites(after)) == 1


def test_heads_that_a_stored_index_picks_are_followed():
    """Falcon's one kv head is indexed for all query heads."""
    after = run(canonical("falcon"), PermuteVo(by="random"))
    assert len(sites(after)) == 2
    assert len(sites(run(canonical("falcon"), PermuteQk(by="random")))) == 2


def test_sizes_that_depend_on_values_are_no_obstacle():
    after = run(canonical("debertav1"), PermuteFfn(by="random"))
    assert len([site for site in sites(after) if "intermediate" in site]) == 2


def test_an_axis_that_stands_alone_is_refused_with_its_reason():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).cumsum(1)

    after = run(program(Alone()), PermuteFfn(by="random"))
    assert sites(after) == []
    assert "linear.weight, axis 0: aten.cumsum.default has no op rule" in refusals(after)


# --- copies of a coordinate -----------------------------------------------------------------------


class Copies(nn.Module):
    """Each hidden unit twice, each copy with a gain of its own, in some order."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(2 * HIDDEN, WIDTH)
        self.gain = nn.Parameter(torch.randn(2 * HIDDEN))
        self.register_buffer("order", torch.randperm(2 * HIDDEN))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.form == "interleaved":
            both = torch.stack((h, h.flip(-1)), -1).flatten(-2) * self.gain
            return self.down(both.unflatten(-1, (HIDDEN, 2)).transpose(-1, -2).flatten(-2))
        both = torch.cat((h, h), -1)
        both = both + self.gain if self.form == "shifted" else both * self.gain
        if self.form == "picked":
            return self.down(both.index_select(-1, self.order))
        if self.form == "exchanged":
            return self.down(torch.cat((both[..., HIDDEN:], both[..., :HIDDEN]), -1))
        return self.down(both[..., self.order])


@pytest.mark.parametrize("form", ["scaled", "shifted", "picked", "exchanged", "interleaved"])
def test_copies_of_a_hidden_unit_change_places_with_their_like(form):
    torch.manual_seed(0)
    after = run(program(Copies(form)), PermuteFfn(by="random"))
    assert sites(after) == ["up"]


class CopiedStream(nn.Module):
    """A residual stream of which each channel stands twice, in another order than it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH, elementwise_affine=False)
        self.bias = nn.Parameter(torch.randn(2 * WIDTH))
        self.register_buffer("order", torch.randperm(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.mix((torch.cat((h, h), -1) + self.bias)[..., self.order])
        return self.head(self.norm(h))


def test_copies_of_a_stream_follow_a_permutation():
    torch.manual_seed(0)
    assert len(sites(run(program(CopiedStream()), PermuteResidual(by="random")))) == 1


class ReorderedHeads(nn.Module):
    """The channels of all heads in another order, or heads picked by an index."""

    def __init__(self, form: str) -> None:
        super().__init__()
        heads = 4 if form == "picked" else 3
        self.heads, self.form = heads, form
        self.q = nn.Linear(WIDTH, heads * 4)
        kv = 2 if form == "picked" else heads
        self.k, self.v = nn.Linear(WIDTH, kv * 4), nn.Linear(WIDTH, kv * 4)
        self.o = nn.Linear(heads * 4, WIDTH)
        self.gain = nn.Parameter(torch.randn(heads, 1, 4))
        self.register_buffer("order", torch.randperm(heads * 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, 4)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        if self.form == "picked":
            k, v = k[:, [0, 1, 1, 0]], v[:, [0, 1, 1, 0]]
            y = functional.scaled_dot_product_attention(q, k, v) * self.gain
            return self.o(y[:, [0, 2, 1, 3]].transpose(1, 2).flatten(-2))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        if self.form == "shuffled":
            return self.o(y[..., self.order])
        return self.o(torch.cat((y[..., 6:], y[..., :6]), -1))


@pytest.mark.parametrize("form", ["picked", "shuffled", "turned"])
def test_heads_are_followed_through_another_order(form):
    torch.manual_seed(0)
    assert sites(run(program(ReorderedHeads(form)), PermuteHeads(by="random")))


def test_bits_that_pick_are_no_row_of_places():
    class Masked(FeedForward):
        def __init__(self) -> None:
            super().__init__(half_scaled)
            self.register_buffer("chosen", torch.ones(HIDDEN, dtype=torch.bool))

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)[..., self.chosen]
            torch._check(y.shape[-1] == HIDDEN)
            return self.down(y)

    after = run(program(Masked()), PermuteFfn(by="random"))
    assert sites(after) == []
    assert "picked by an index" in refusals(after)


# --- gains that something else holds, too ---------------------------------------------------------


class Mixer(nn.Module):
    """A norm whose channels share what reads them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm, self.form = nn.RMSNorm(WIDTH), form
        self.first, self.second = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 5)
        self.part, self.conv = nn.Linear(4, 4), nn.Conv1d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.form == "tokens":
            mixed = self.second(functional.gelu(self.first(y.transpose(1, 2))))
            return x + mixed.transpose(1, 2)
        return self.part(y.unflatten(-1, (2, 4))) if self.form == "halves" else self.conv(y)


@pytest.mark.parametrize("form", ["tokens", "halves", "conv"])
def test_different_gains_of_channels_that_change_alike_stay(form):
    module = Mixer(form)
    randomize(module)
    after = run(plain(module, torch.randn(2, 5, WIDTH)), FoldNorm())
    assert sites(after) == []
    assert "norm" in refusals(after)


def test_a_negative_gain_that_is_read_outside_a_norm_stays():
    class Outside(SharedNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(x)) + self.b((x * self.norm.weight).relu())

    module = Outside(nonlinear=True)
    randomize(module)
    module.norm.weight.data = -torch.linspace(0.5, 1.5, WIDTH)
    after = run(plain(module, torch.randn(2, 5, WIDTH)), FoldNorm())
    assert sites(after) == []
    assert "negative" in refusals(after)


def test_no_cache_is_divided_by_a_zero_gain():
    before = canonical("deepseekv3")
    (name,) = [
        n for n in before.weights() if n.endswith("layers.0.self_attn.kv_a_layernorm.weight")
    ]
    gain = before.weight(name).clone()
    gain[0] = 0
    before.set_weight(name, gain)
    after = run(before, FoldNorm())
    assert "a cache would be divided by them" in refusals(after)
    assert not any("layers.0.self_attn.kv_a" in site for site in sites(after))
