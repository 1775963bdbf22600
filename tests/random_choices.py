"""The axes along which random transformers vary, and a strategy that draws from all of them."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# Every axis with all of its values. The values of an axis are drawn independently of the others
# unless `possible` drops the pair.
AXES: dict[str, tuple[Any, ...]] = {
    "width": (16, 24, 32, 48),
    "layers": (1, 2),
    "heads": (2, 4, 6),
    "groups": (1, 2, 3, 6),  # kv heads
    "head_width": (4, 6, 8, 10, 12),
    "hidden": (7, 13, 16, 21, 32),
    "norm": ("layer_norm", "rms_norm", "offset_rms_norm", "none"),
    "norm_bias": (False, True),
    "norm_written_out": (False, True),
    "placement": ("pre", "post", "sandwich"),
    "activation": (
        *("relu", "gelu", "gelu_tanh", "silu", "squared_relu"),
        *("gated_silu", "gated_gelu", "gated_identity"),
    ),
    "attention_bias": (False, True),
    "feed_forward_bias": (False, True),
    "attention_form": ("sdpa", "softmax"),
    "mask_form": ("boolean", "additive"),
    "causal": (False, True),
    "window": (None, 2, 3),
    "rope": ("none", "halves", "interleaved", "partial"),
    "qk_norm": ("none", "head", "projection"),
    "projections": ("separate", "fused", "fused_per_head", "query_gate"),
    "fused_gate_up": (False, True),
    "parallel": ("no", "one_norm", "two_norms"),
    "cross_attention": (False, True),
    "experts": (0, 2, 3, 4),
    "tokens": (False, True),  # token embedding; without it the input is [B, S, d]
    "positions": ("none", "learned", "sinusoidal"),
    "unembedding": ("none", "tied", "untied"),
    "residual_multiplier": ("none", "float", "parameter"),
    "layer_scale": (False, True),
    "score_softcap": (False, True),
    "logit_softcap": (False, True),
    "negative_gains": (False, True),
}
VOCABULARY = 37
MAX_LENGTH = 64


@dataclass(frozen=True)
class Choice:
    """One value on every axis; the defaults are a small Llama."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    groups: int = 2
    head_width: int = 8
    hidden: int = 32
    norm: str = "rms_norm"
    norm_bias: bool = False
    norm_written_out: bool = True
    placement: str = "pre"
    activation: str = "gated_silu"
    attention_bias: bool = False
    feed_forward_bias: bool = False
    attention_form: str = "sdpa"
    mask_form: str = "boolean"
    causal: bool = True
    window: int | None = None
    rope: str = "halves"
    qk_norm: str = "none"
    projections: str = "separate"
    fused_gate_up: bool = False
    parallel: str = "no"
    cross_attention: bool = False
    experts: int = 0
    tokens: bool = True
    positions: str = "none"
    unembedding: str = "untied"
    residual_multiplier: str = "none"
    layer_scale: bool = False
    score_softcap: bool = False
    logit_softcap: bool = False
    negative_gains: bool = False

    @property
    def grouping(self) -> str:
        """`mha`, `gqa` or `mqa`."""
        return {self.heads: "mha", 1: "mqa"}.get(self.groups, "gqa")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two projections."""
        return self.activation.startswith("gated_")

    @property
    def rotary(self) -> int:
        """How many channels of a head rope turns: 2 or 4 fewer than all when it is partial."""
        partial = self.head_width - (2 if self.head_width < 8 else 4)
        return partial if self.rope == "partial" else self.head_width


def possible(axis: str, value: Any, drawn: dict[str, Any]) -> bool:
    """Whether a value can go with what was drawn for the axes before it."""
    match axis, value:
        case "groups", groups:  # each kv head serves as many query heads
            return drawn["heads"] % groups == 0
        case "norm_bias", True:  # rms norms have no bias, and no norm has none
            return drawn["norm"] == "layer_norm"
        case "norm_written_out", True:  # there is nothing to write out
            return drawn["norm"] != "none"
        case "norm_written_out", False:  # torch has no norm with the gain 1 + w
            return drawn["norm"] != "offset_rms_norm"
        case "fused_gate_up", True:  # without a gate there is nothing to fuse
            return drawn["activation"].startswith("gated_")
        case "unembedding", "tied":  # tied to the token embedding
            return drawn["tokens"]
        case "score_softcap", True:  # F.scaled_dot_product_attention has no cap
            return drawn["attention_form"] == "softmax"
        case "logit_softcap", True:  # a hidden state is not capped
            return drawn["unembedding"] != "none"
        case _:
            return True


@st.composite
def choices(draw: st.DrawFn, **fixed: Any) -> Choice:
    """Any possible choice; `fixed` axes keep the given value, and must be possible."""
    drawn: dict[str, Any] = {}
    for axis, values in AXES.items():
        offered = (fixed[axis],) if axis in fixed else values
        drawn[axis] = draw(st.sampled_from([v for v in offered if possible(axis, v, drawn)]))
    return Choice(**drawn)
