"""Every entry of the table of operators that is no plain "yes": who refuses, where, and why.

Each row has a module in which an operator stands in the way of a change of basis, and a sibling
without that operator. A pass has to leave the first alone, with the right reason, and to find its
site in the second. All modules are captured as one program, on which each pass runs once.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Symmetry, symmetries
from fxopt.analysis.transform import apply
from fxopt.errors import AnalysisError
from fxopt.ir.program import PassRecord, Program
from fxopt.passes.base import Pass
from fxopt.passes.equivalence.equalize import Equalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from tests.models import randomize
from tests.passes.equivalence.harness import canonical, plain, run
from tests.zoo import rotary_table, rotate_half

WIDTH, HEAD, VOCABULARY = 8, 4, 9

PASSES: dict[str, Pass] = {
    "equalize": Equalize(),
    "smoothquant": SmoothQuant(ride=False),
    "fold-norm": FoldNorm(centre=True),
    "rotate": Rotate(online=False),
    "permute-ffn": PermuteFfn(by="random"),
    "permute-vo": PermuteVo(by="random"),
    "permute-qk": PermuteQk(by="random"),
    "permute-heads": PermuteHeads(by="random"),
    "permute-residual": PermuteResidual(by="random"),
}


# --- modules with one hidden axis -----------------------------------------------------------------


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def layer_norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False)


def rms_norm(gain: bool = False) -> nn.RMSNorm:
    return nn.RMSNorm(WIDTH, elementwise_affine=gain)


class PlusOne(nn.Module):
    """A number added to every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class RunningSum(nn.Module):
    """An operator without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


class NormOfHalf(nn.Module):
    """A norm that looks at the first half of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x[..., : WIDTH // 2], [WIDTH // 2])
        return torch.cat((normed, normed), -1)


class Gain(nn.Module):
    """A factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Block(nn.Module):
    """What has one hidden axis, with some modules between its writers and its readers."""

    def __init__(self, *between: nn.Module, returned: bool = False) -> None:
        super().__init__()
        self.between = nn.Sequential(*between)
        self.returned = returned

    def results(self, result: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return (result, hidden) if self.returned else (result,)


class Hidden(Block):
    """down(between(up(x))): the neurons of a feed-forward block."""

    def __init__(self, *between: nn.Module, up: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*between, **options)
        self.up, self.down = up or linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.up(x)
        return self.results(self.down(self.between(hidden)), hidden)


class Gated(Block):
    """down(silu(gate(x)) * between(up(x)))."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__(*between)
        self.gate, self.up, self.down = linear(), linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.down(functional.silu(self.gate(x)) * self.between(self.up(x))),)


class Stream(Block):
    """out(between(a(x) + b(x))): a residual stream, which `also` may read too."""

    def __init__(
        self,
        *between: nn.Module,
        b: nn.Module | None = None,
        also: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*between, **options)
        self.a, self.b, self.out = linear(), b or linear(), linear()
        self.also = also

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.a(x) + self.b(x)
        result = self.out(self.between(hidden))
        return self.results(result if self.also is None else result + self.also(hidden), hidden)


class Attention(Block):
    """Attention with `between` behind the values' heads and `behind_q` behind the queries.

    A head sees as many of the nearest tokens as its entry of `windows` says.
    """

    def __init__(
        self,
        *between: nn.Module,
        heads: int = 2,
        kv_heads: int = 2,
        behind_q: nn.Module | None = None,
        rope: bool = False,
        stretch: bool = False,
        windows: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(*between, **options)
        self.q, self.o = nn.Linear(WIDTH, heads * HEAD), nn.Linear(heads * HEAD, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD) for _ in range(2))
        self.behind_q = behind_q or nn.Identity()
        self.rope = rope
        # The two channels of a pair turn by different angles.
        self.register_buffer("stretch", torch.linspace(1, 2, HEAD) if stretch else None)
        self.register_buffer("windows", torch.tensor(windows).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        projected = (self.behind_q(self.q(x)), self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in projected)
        place = torch.arange(x.shape[1])
        if self.rope:
            cos, sin = rotary_table(place, HEAD, interleaved=False)
            if self.stretch is not None:
                cos, sin = cos * self.stretch, sin * self.stretch
            q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        seen = (place[:, None] - place).abs() < self.windows if self.windows.numel() else None
        grouped = q.shape[1] != k.shape[1]
        y = functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=grouped)
        return self.results(self.o(self.between(y.transpose(1, 2).flatten(-2))), v)


class Tokens(nn.Module):
    """unembed(norm(x + mix(x))) of x = embed(ids); the head is tied to the table or not."""

    def __init__(
        self, norm: nn.Module | None = None, mix: nn.Module | None = None, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, WIDTH), mix or linear()
        self.norm = norm or nn.Identity()
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.unembed.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        return (self.unembed(self.norm(x + self.mix(x))),)


# --- the table ------------------------------------------------------------------------------------

NONLINEAR = "a nonlinear function reads it"
BEHIND = "what it reads comes out of aten.gelu.default and cannot change"
FROM_INPUT = "what it reads comes from the input 'arg0' and cannot change"
COMBINED = "it is combined with a value that no weight can change"
BY_CHANNEL = "it is multiplied channel by channel"
MEASURED = "a norm measures all of it together"
SUBTRACTS = "layer_norm subtracts a mean, which a rotation would move"
UNFOLDED = "the gain of a norm stands in the way; run fold-norm first"
DISAGREE = "what one use multiplies, another would have to divide"
ADDED = "a number is added to it"
OUTPUT = "it is the model's output"
NO_RULE = "has no op rule"


@dataclass(frozen=True)
class Row:
    """An operator and a kind of change, the pass that asks, and modules with and without it.

    `site` is where the pass would change the axis, `refused` where it says why it does not, if
    that is another place.
    """

    what: str
    by: str
    blocked: nn.Module
    free: nn.Module
    site: str
    reason: str
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.what}, {self.by}"


torch.manual_seed(0)
HIDDEN, RELU, GELU = Hidden(), Hidden(nn.ReLU()), Hidden(nn.GELU())
SILU, TANH, SOFTMAX = Hidden(nn.SiLU()), Hidden(nn.Tanh()), Hidden(nn.Softmax(-1))
GATED, STUCK_GATE = Gated(), Gated(nn.Tanh())
STREAM, WITH_INPUT, PLUS_ONE = Stream(), Stream(b=nn.Identity()), Stream(PlusOne())
LAYER_NORM, RMS_NORM, GAIN = Stream(layer_norm()), Stream(rms_norm()), Stream(rms_norm(True))
ATTENTION, TIED = Attention(), Tokens(tied=True)
HIDDEN_OUT, STREAM_OUT = Hidden(returned=True), Stream(returned=True)

# fmt: off
ROWS = [Row(*entry) for entry in (
    # the operator and the kind, the pass, with it, without it, the site, the reason
    ("add of an input, PERMUTE", "permute-residual", WITH_INPUT, STREAM, "a", COMBINED),
    ("add of an input, SCALE", "equalize", WITH_INPUT, STREAM, "a", COMBINED),
    ("add of an input, ROTATE", "rotate", WITH_INPUT, STREAM, "a", COMBINED),
    ("add of a number, SCALE", "equalize", PLUS_ONE, STREAM, "a", ADDED),
    ("add of a number, ROTATE", "rotate", PLUS_ONE, STREAM, "a", ADDED),
    ("mul, SCALE: neither factor", "equalize", STUCK_GATE, GATED, "up", NONLINEAR),
    ("mul, ROTATE", "rotate", Stream(Gain()), STREAM, "a", BY_CHANNEL),
    ("relu, ROTATE", "rotate", Stream(nn.ReLU()), STREAM, "a", NONLINEAR),
    ("gelu, SCALE", "equalize", GELU, RELU, "up", NONLINEAR),
    ("gelu, SCALE", "smoothquant", GELU, RELU, "up", BEHIND, "down"),
    ("gelu, ROTATE", "rotate", Stream(nn.GELU()), STREAM, "a", NONLINEAR),
    ("silu, SCALE", "equalize", SILU, RELU, "up", NONLINEAR),
    ("silu, ROTATE", "rotate", Stream(nn.SiLU()), STREAM, "a", NONLINEAR),
    ("tanh, SCALE", "equalize", TANH, RELU, "up", NONLINEAR),
    ("tanh, ROTATE", "rotate", Stream(nn.Tanh()), STREAM, "a", NONLINEAR),
    ("layer norm, SCALE", "equalize", LAYER_NORM, STREAM, "a", MEASURED),
    ("layer norm, ROTATE", "rotate", LAYER_NORM, RMS_NORM, "a", SUBTRACTS),
    ("rms norm, SCALE", "equalize", RMS_NORM, STREAM, "a", MEASURED),
    ("rms norm, ROTATE", "rotate", GAIN, RMS_NORM, "a", UNFOLDED),
    ("v, PERMUTE", "permute-vo", Attention(RunningSum()), ATTENTION, "v", NO_RULE),
    ("v, SCALE", "equalize", Attention(nn.GELU()), ATTENTION, "v", NONLINEAR),
    ("v, ROTATE", "rotate", Attention(Gain()), ATTENTION, "v", BY_CHANNEL),
    ("q and k, PERMUTE", "permute-qk", Attention(behind_q=RunningSum()), ATTENTION, "q", NO_RULE),
    ("q and k, SCALE", "equalize", Attention(behind_q=nn.GELU()), ATTENTION, "q", NONLINEAR),
    ("heads, PERMUTE", "permute-heads",
     Attention(windows=(2, 3)), Attention(windows=(3, 3)), "q", "a mask or bias belongs to"),
    ("softmax, SCALE", "equalize", SOFTMAX, HIDDEN, "up", "softmax reads it"),
    ("softmax, ROTATE", "rotate", Stream(nn.Softmax(-1)), STREAM, "a", "softmax reads it"),
    ("tied table, SCALE", "equalize", TIED, Tokens(), "embed", DISAGREE),
    ("input, SCALE", "smoothquant", Hidden(up=nn.Identity()), HIDDEN, "up", FROM_INPUT, "down"),
    ("output, PERMUTE", "permute-ffn", HIDDEN_OUT, HIDDEN, "up", OUTPUT),
    ("output, PERMUTE", "permute-vo", Attention(returned=True), ATTENTION, "v", OUTPUT),
    ("output, PERMUTE", "permute-residual", STREAM_OUT, STREAM, "a", OUTPUT),
    ("output, SCALE", "equalize", HIDDEN_OUT, HIDDEN, "up", OUTPUT),
    ("output, ROTATE", "rotate", STREAM_OUT, STREAM, "a", OUTPUT),
    ("unknown operator, PERMUTE", "permute-ffn", Hidden(RunningSum()), HIDDEN, "up", NO_RULE),
    # gains that stay, and means
    ("gelu behind a gain", "fold-norm",
     Stream(rms_norm(True), nn.GELU()), GAIN, "between.0", NONLINEAR),
    ("norm behind a gain", "fold-norm",
     Stream(rms_norm(True), rms_norm()), GAIN, "between.0", MEASURED),
    ("linear, CENTRE", "fold-norm",
     Stream(layer_norm(), also=linear()), LAYER_NORM, "a", "its mean is read", "between.0"),
    ("rms norm, CENTRE", "fold-norm",
     Stream(layer_norm(), also=rms_norm()), LAYER_NORM, "a", "reads the mean", "between.0"),
    ("part of a stream, CENTRE", "fold-norm",
     Stream(layer_norm(), also=NormOfHalf()), LAYER_NORM, "a", "reads a part", "between.0"),
    ("tied table, CENTRE", "fold-norm", Tokens(layer_norm(), nn.Identity(), tied=True),
     Tokens(layer_norm(), nn.Identity()), "embed", "run untie first", "norm"),
)]
# fmt: on

# Where the table says that a change passes.
PASSING = [
    ("relu", "permute-ffn", RELU, "up"),
    ("relu", "equalize", RELU, "up"),
    ("gelu", "permute-ffn", GELU, "up"),
    ("silu", "permute-ffn", SILU, "up"),
    ("tanh", "permute-ffn", TANH, "up"),
    ("softmax", "permute-ffn", SOFTMAX, "up"),
    ("mul", "permute-ffn", STUCK_GATE, "gate"),
    ("layer norm", "permute-residual", LAYER_NORM, "a"),
    ("layer norm's gain", "equalize", Stream(nn.LayerNorm(WIDTH)), "between.0"),
    ("rms norm", "permute-residual", GAIN, "a"),
    ("rms norm's gain", "equalize", GAIN, "between.0"),
    ("tied table", "permute-residual", TIED, "embed"),
]

# What changes as one: a head of four channels, a pair of them, a group of heads.
ONE_HEAD, FOUR_HEADS = Attention(heads=1, kv_heads=1), Attention(heads=4, kv_heads=4)
GROUPS, ROPE = Attention(heads=4), Attention(rope=True)
STRETCHED = Attention(rope=True, stretch=True)
BLOCKS = [
    ("v", "permute-vo", ONE_HEAD, "v", ["4 value"]),
    ("v of two heads", "permute-vo", ATTENTION, "v", ["2 blocks of 4 value"]),
    ("v of two groups", "permute-vo", GROUPS, "v", ["2 blocks of 4 value"]),
    ("v", "rotate", ONE_HEAD, "v", ["R2, 1 x 4"]),
    ("v of two heads", "rotate", ATTENTION, "v", ["R2, 2 x 4"]),
    ("q and k of two heads", "permute-qk", ATTENTION, "q", ["2 blocks of 4 query_key"]),
    ("pairs of two heads", "permute-qk", ROPE, "q", ["2 blocks of 2 query_key"]),
    ("stretched pairs", "permute-qk", STRETCHED, "q", ["2 blocks of 2 query_key"]),
    ("heads", "permute-heads", FOUR_HEADS, "q", ["4 heads"]),
    ("heads of two groups", "permute-heads", GROUPS, "q", ["2 blocks of 2 heads", "2 heads"]),
]


class Table(nn.Module):
    """All modules side by side, on one input or on tokens."""

    def __init__(self) -> None:
        super().__init__()
        listed = [module for row in ROWS for module in (row.blocked, row.free)]
        listed += [module for _, _, module, *_ in [*PASSING, *BLOCKS]]
        self.rows = nn.ModuleList(dict.fromkeys(listed))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        results = [row(ids if isinstance(row, Tokens) else x) for row in self.rows]
        return tuple(result for several in results for result in several)


TABLE = Table()


def place(module: nn.Module, site: str) -> str:
    """The path of a part of one of the modules."""
    index = next(i for i, row in enumerate(TABLE.rows) if row is module)
    return f"rows.{index}.{site}"


@cache
def program() -> Program:
    randomize(TABLE)
    return plain(TABLE, torch.randn(2, 5, WIDTH), torch.randint(0, VOCABULARY, (2, 5)))


@cache
def record(by: str) -> PassRecord:
    """What a pass did to all modules; the harness has compared it in float64."""
    return run(program(), PASSES[by]).history[-1]


def details(by: str, module: nn.Module, site: str) -> list[str]:
    """What a pass did at a site."""
    return [found.detail for found in record(by).sites if found.path == place(module, site)]


def reasons(by: str, module: nn.Module, site: str) -> str:
    """Why a pass did nothing at a site."""
    named = re.compile(rf"{re.escape(place(module, site))}\b")
    return "\n".join(r.reason for r in record(by).refusals if named.search(r.site))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_operator_is_refused_and_its_sibling_is_not(row):
    assert details(row.by, row.free, row.site)
    assert not details(row.by, row.blocked, row.site)
    assert row.reason in reasons(row.by, row.blocked, row.refused or row.site)


@pytest.mark.parametrize(("what", "by", "module", "site"), PASSING)
def test_what_the_table_lets_through_is_found(what, by, module, site):
    assert details(by, module, site), what


@pytest.mark.parametrize(("what", "by", "module", "site", "expected"), BLOCKS)
def test_heads_pairs_and_groups_stay_together(what, by, module, site, expected):
    found = [detail.partition(":")[0] for detail in details(by, module, site)]
    assert [detail.partition(" coordinates")[0] for detail in found] == expected, what


def test_a_kv_head_that_moved_with_its_group_is_not_refused():
    assert "a kv head moves only with its whole group" not in reasons("permute-heads", GROUPS, "k")


def query_key(module: nn.Module, kind: Kind) -> list[Symmetry]:
    """The symmetries of the queries of a module."""
    found = symmetries(program(), kind).of_role("query_key")
    return [symmetry for symmetry in found if symmetry.path == place(module, "q")]


def test_the_channels_of_a_pair_share_their_factor():
    (free,), (paired,) = (query_key(module, Kind.SCALE) for module in (ATTENTION, ROPE))
    assert (free.size, paired.size) == (2 * HEAD, HEAD)
    pairs = paired.weights[0].positions[0]
    assert (pairs[:, 1] - pairs[:, 0] == HEAD // 2).all()


def test_rope_commutes_with_turns_of_its_own_planes_alone():
    (free,), (paired,) = (query_key(module, Kind.ROTATE) for module in (ATTENTION, ROPE))
    assert (free.blocks, free.size, free.planar) == (2, HEAD, False)
    assert (paired.blocks, paired.size, paired.planar) == (HEAD, 2, True)
    pairs = paired.weights[0].positions[:, :, 0]
    assert (pairs[:, 1] - pairs[:, 0] == HEAD // 2).all()


def test_a_turn_may_not_reflect():
    (paired,) = query_key(ROPE, Kind.ROTATE)
    mirrors = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).expand(HEAD, 2, 2)
    with pytest.raises(AnalysisError, match="rotary embedding turns pairs of these channels"):
        apply(program(), paired, mirrors)
    with pytest.raises(AnalysisError, match="not orthogonal"):
        apply(program(), paired, 2 * mirrors)


def test_two_angles_in_a_pair_stand_in_the_way_of_turns():
    assert query_key(STRETCHED, Kind.ROTATE) == []
    assert "by angles that may differ" in str(symmetries(program(), Kind.ROTATE))


@pytest.mark.parametrize("by", ["permute-vo", "permute-qk", "permute-heads", "equalize", "rotate"])
def test_a_cache_is_state_and_no_output(by):
    """Keys and values that go on to the next call change alike; plain outputs do not change."""
    after = run(canonical("llama"), PASSES[by])
    assert any("self_attn" in site.path for site in after.history[-1].sites)
    assert not any(OUTPUT in r.reason for r in after.history[-1].refusals if "self_attn" in r.site)
