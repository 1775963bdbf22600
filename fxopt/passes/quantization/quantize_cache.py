"""Hold the keys and values of a decoder in few bits between calls, in the graph itself.

    int8, fp8:   s = max |x| / q_max over a token of a head,  q = round(x / s),  x ~ s q
                 (fp8: of 8 scales up to twice that, the one of the least squared error)
    int4, int2:  s = (max - min) / (2^b - 1) over a group,  q = round((x - min) / s),  x ~ s q + min

A group is `group` consecutive tokens of a channel of the keys, or `group` consecutive channels of a
token of the values. The newest `window` tokens or fewer stay in floating point; when they are
`window`, the whole block is quantized, keys and values alike (the paper lets one token of the
values go at each step). A token is quantized once. What a call computes itself it reads as it is.

Shapes: keys and values [B, H, T, D] become values [B, H, T, D] and scale [B, H, T, 1]; or packed
    [B, H, N, W, D b / 8], scale and minimum [B, H, N, W / G, D] (keys) or [B, H, N, W, D / G]
    (values), residual [B, H, r, D], where T = N W + r.
Exactness: approximate; half a step of each scale per element, none in the residual.
Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024,
    arXiv:2402.02750.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fxopt.errors import RecipeError
from fxopt.ir.operators.cache import TOKEN_FORMATS
from fxopt.ir.program import Level, Program, Refusal, Site
from fxopt.ir.state_form import StateForm
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.passes.quantization.cache_state import CacheState, cache_states, replace_states

_SMALLEST_GROUP = 4
_NOTE = "the form of the cache changes: caches made by the original no longer fit"


@register("quantize-cache")
@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Hold the key/value cache in 8 bits per token, or in 4 or 2 bits in groups (KIVI)."""

    dtype: Literal["int8", "fp8_e4m3", "fp8", "int4", "int2"] = "int8"
    group: int = 32
    window: int = 128
    scales: Literal["model", "float32", "float16"] = "model"

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    output_level = Level.QUANTIZED
    # A later change of basis would have to turn what is rounded already.
    after = (
        *("canonicalize", "untie", "fold-norm", "rotate", "smoothquant", "equalize", "awq-scale"),
        *("slice-channels", "permute-ffn", "permute-heads", "permute-qk", "permute-residual"),
        "permute-vo",
    )

    def __post_init__(self) -> None:
        if self.group < 1 or self.window < 1 or self.window % self.group:
            raise RecipeError(
                f"group {self.group} and window {self.window}: both must be positive and the "
                "window a multiple of the group, for blocks of that many tokens are quantized at "
                "once."
            )

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every state that is a plain list of tokens."""
        del context
        if program.signature.cache is None:
            reason = "it was captured without a key/value cache: there is nothing to quantize"
            return PassResult(refusals=(Refusal("the program", reason),))
        sites: list[Site] = []
        refusals: list[Refusal] = []
        chosen: list[tuple[CacheState, StateForm]] = []
        for state in cache_states(program):
            if isinstance(state, Refusal):
                refusals.append(state)
                continue
            form = self._form(state)
            reason = self._refusal(state, form)
            if reason is not None:
                refusals.append(Refusal(state.name, reason))
                continue
            chosen.append((state, form))
            sites.append(Site(state.path, _detail(state, form), state.reader))
        changes = replace_states(program, chosen, self.scales) if chosen else {}
        past = max((max(form.window, 1) for _, form in chosen), default=0)
        notes = (_NOTE,) if chosen else ()
        return PassResult(tuple(sites), tuple(refusals), notes, changes, past, activations={})

    def _form(self, state: CacheState) -> StateForm:
        if self.dtype in TOKEN_FORMATS:
            return StateForm(TOKEN_FORMATS[self.dtype].name)  # "fp8" is what recipes of before say
        # Groups of channels must divide a head; SmolLM2's 64 take 32, a head of 80 takes 16.
        group = math.gcd(self.group, state.width) if state.values else self.group
        return StateForm(self.dtype, group, self.window, per_channel=not state.values)

    def _refusal(self, state: CacheState, form: StateForm) -> str | None:
        if form.bits and state.width * form.bits % 8:
            return (
                f"a head of {state.width} channels does not fill whole bytes at {form.bits} bits; "
                "choose a dtype of more bits"
            )
        if state.values and form.bits and form.group < _SMALLEST_GROUP:
            return (
                f"a head of {state.width} channels has no groups of {self.group}, and with groups "
                f"of {form.group} the scales would be larger than the numbers; choose a group that "
                "divides the head"
            )
        return None


def _detail(state: CacheState, form: StateForm) -> str:
    return f"{'values' if state.values else 'keys'} held as {form.describe()}"
