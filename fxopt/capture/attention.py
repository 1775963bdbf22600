"""Let HF models hand over attention, its mask and their experts as whole operators.

transformers calls attention, mask construction and expert layers through registries. fxopt
registers one function in each, so that the captured graph holds `fxopt::attention` with a
structured mask and `fxopt::moe` instead of the small operators they are made of.
"""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fxopt.errors import CaptureError
from fxopt.ir.operators import ACTIVATIONS, activate

IMPLEMENTATION = "fxopt"
# Where a mask that names no window is looked at; no model has a wider window than the last.
_FAR = tuple(1 << power for power in range(3, 21))


@dataclass(frozen=True)
class StructuredMask:
    """How a mask was made, in the arguments of `fxopt::attention`.

    Models pass it from where masks are made to where attention runs, as they would a tensor.
    """

    padding: Tensor | None
    explicit: Tensor | None
    causal: bool
    window: int | None

    def to(self, *_: Any, **__: Any) -> "StructuredMask":
        """A mask has no dtype or device of its own."""
        return self


def build_mask(
    batch_size: Any,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> StructuredMask:
    """The mask function registered with transformers; it never builds a plain mask tensor."""
    aligned = statically_known_true(q_offset + q_length == kv_offset + kv_length)
    kind = _recognize(mask_function, local_size) if mask_function is not None else None
    if kind is None or not (aligned or kind == (False, None)):
        kwargs.pop("allow_is_causal_skip", None)
        kwargs.pop("allow_is_bidirectional_skip", None)
        # vmap, which transformers asks for where a model brings a function of its own, would stay
        # in the graph as an operator of higher order; functions of positions need none.
        kwargs["use_vmap"] = False
        explicit = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,  # type: ignore[arg-type]
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        return StructuredMask(None, explicit, False, None)
    padding = attention_mask
    if padding is not None:
        padding = padding.to(torch.bool)
        if not statically_known_true(padding.shape[-1] == kv_length):
            # A window keeps the last keys; what came before them is gone from cache and mask.
            padding = padding[:, padding.shape[-1] - kv_length :]
    return StructuredMask(padding, None, *kind)


def _recognize(
    mask_function: Callable[..., Any], local_size: int | None
) -> tuple[bool, int | None] | None:
    """Tell (causal, window) by evaluating the mask on a small grid, or None for anything else."""
    with concrete_tensors():
        return _recognize_on_grid(mask_function, local_size)


def _recognize_on_grid(
    mask_function: Callable[..., Any], local_size: int | None
) -> tuple[bool, int | None] | None:
    windows = [None] if local_size is None else [None, local_size, local_size + 1]
    # Positions around every edge that a window or a chunk can have tell the kinds apart; a full
    # grid would be quadratic in the window. A window that is not told may have any size: each
    # is left by some pair of positions that are powers of two apart.
    edges = [0, *_FAR] if local_size is None else [n * local_size for n in range(4)]
    position = torch.tensor(sorted({e + d for e in edges for d in range(-2, 5) if e + d >= 0}))
    queries, keys = position[:, None], position[None, :]
    zero = torch.zeros((), dtype=torch.long)
    try:
        seen = torch.as_tensor(mask_function(zero, zero, queries, keys))
        if type(seen) is not Tensor:
            return None  # it closes over tensors of the model's inputs
        seen = seen.to(torch.bool).expand(queries.shape[0], keys.shape[1])
    except Exception:
        return None  # it indexes something by batch or head: not a structured kind
    for causal in (True, False):
        for window in windows:
            expected = torch.ones_like(seen)
            if causal:
                expected = expected & (keys <= queries)
            if window is not None:
                expected = expected & ((queries - keys).abs() < window)
            if torch.equal(seen, expected):
                return causal, window
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers; emits one `fxopt::attention`."""
    del dropout
    if kwargs.get("output_attentions"):
        raise CaptureError(
            "the model asks for attention maps (output_attentions=True), which fused attention "
            "never forms. Set config.output_attentions to False."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if isinstance(attention_mask, StructuredMask):
        mask = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        skip = attention_mask is not None or query.shape[2] == 1
        mask = StructuredMask(None, attention_mask, bool(causal) and not skip, None)
    explicit = mask.explicit
    if position_bias is not None:
        explicit = position_bias if explicit is None else _add_bias(position_bias, explicit)
    out = torch.ops.fxopt.attention(
        query,
        key,
        value,
        mask.padding,
        explicit,
        s_aux,
        scale,
        mask.causal,
        mask.window,
        softcap or None,
    )
    return out.transpose(1, 2), None


def _add_bias(bias: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def route_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts function registered with transformers; emits one `fxopt::moe`.

    Raises:
        CaptureError: the experts are laid out in a way that `fxopt::moe` does not know.
    """
    experts: Any = module
    if getattr(experts, "has_post_expert_norm", False) or getattr(
        experts, "_is_expert_parallel", False
    ):
        raise CaptureError("the experts normalize their output or are spread over devices.")
    gated = bool(getattr(experts, "has_gate", True))
    activation = name_activation(getattr(experts, "act_fn", None))
    apply_gate = getattr(type(experts), "_apply_gate", None)
    if activation is None or (apply_gate is not None and not _is_plain_gate(experts, activation)):
        raise CaptureError("the experts use an activation or a gate of their own.")
    up = experts.gate_up_proj if gated else experts.up_proj
    down = experts.down_proj
    if getattr(experts, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    biased = bool(getattr(experts, "has_bias", False))
    up_bias = (experts.gate_up_proj_bias if gated else experts.up_proj_bias) if biased else None
    return torch.ops.fxopt.moe(
        hidden_states,
        top_k_index,
        top_k_weights,
        up,
        down,
        up_bias,
        experts.down_proj_bias if biased else None,
        activation,
        gated,
    )


def _is_plain_gate(experts: Any, activation: str) -> bool:
    with concrete_tensors():
        probe = torch.linspace(-3, 3, 16).reshape(2, 8)
        gate, up = probe.chunk(2, -1)
        try:
            seen = experts._apply_gate(probe)
        except Exception:
            return False  # a gate that cannot take the probe is not the plain one
        expected = activate(gate, activation) * up
    return seen.shape == expected.shape and torch.allclose(seen, expected, atol=1e-6)


def name_activation(function: Any) -> str | None:
    """The name of an elementwise activation, told by its values on a grid."""
    if function is None:
        return None
    with concrete_tensors():
        grid = torch.linspace(-6, 6, 97)
        try:
            seen = function(grid)
        except Exception:
            return None  # whatever it is, it is not elementwise on one tensor
        for name in ACTIVATIONS:
            if torch.allclose(seen, activate(grid, name), atol=1e-6, rtol=1e-5):
                return name
    return None


@contextlib.contextmanager
def concrete_tensors() -> Generator[None]:
    """Leave tracing for a moment: tensors made inside are real and stay out of the graph."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        yield


@contextlib.contextmanager
def attention_implementation(
    model: nn.Module, attention: str, experts: str | None
) -> Generator[None]:
    """Switch every config in the model to an implementation, and back on leaving."""
    saved: list[tuple[Any, str, Any]] = []
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    for config in configs.values():
        for attribute, value in (
            ("_attn_implementation_internal", attention),
            ("_experts_implementation_internal", experts),
        ):
            if value is not None and hasattr(config, attribute):
                saved.append((config, attribute, getattr(config, attribute)))
                setattr(config, attribute, value)
    try:
        yield
    finally:
        for config, attribute, value in reversed(saved):
            setattr(config, attribute, value)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, build_mask)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, route_experts)
