"""Mixtures of experts on stored codes: what `fxopt::moe` gives on the weights they stand for."""

import pytest
import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from tests.kernels.cases import DTYPE_IDS, FLOATING
from tests.kernels.tolerances import assert_close

ops = torch.ops.fxopt
EXPERTS, INPUTS, HIDDEN, GROUPS = 5, 32, 24, 4
TABLE = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)


def routing(tokens: int, chosen: int = 2) -> tuple[Tensor, Tensor]:
    """Some tokens are sent nowhere, and the last expert is sent nothing."""
    index = torch.randint(0, EXPERTS - 1, (tokens, chosen))
    index[::3, -1] = EXPERTS
    return index, torch.rand(tokens, chosen)


def biases(rows: int, biased: bool) -> tuple[Tensor | None, Tensor | None]:
    return (torch.randn(EXPERTS, rows), torch.randn(EXPERTS, INPUTS)) if biased else (None, None)


def int8_experts(rows: int, columns: int) -> tuple[list[Tensor], Tensor]:
    codes = torch.randint(-127, 128, (EXPERTS, rows, columns), dtype=torch.int8)
    scale = torch.rand(EXPERTS, rows) / 127 / columns**0.5
    return [codes, scale], codes * scale[..., None]


def four_bit_experts(rows: int, columns: int, zeros: bool) -> tuple[list[Tensor | None], Tensor]:
    codes = torch.randint(-8, 8, (EXPERTS, rows, columns), dtype=torch.int8)
    scale = torch.rand(EXPERTS, rows, GROUPS) / 8 / columns**0.5
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8) if zeros else None
    centred = codes.unflatten(-1, (GROUPS, -1)) - (0 if zero is None else zero[..., None])
    parts = [ops.pack(codes, 4), scale, zero, TABLE]
    return parts, (centred * scale[..., None]).flatten(-2)


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 50])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
def test_int8_experts(native, tokens, gated, biased, dtype):
    rows = 2 * HIDDEN if gated else HIDDEN
    (up, up_exact), (down, down_exact) = int8_experts(rows, INPUTS), int8_experts(INPUTS, HIDDEN)
    x, routed, bias = torch.randn(tokens, INPUTS).to(dtype), routing(tokens), biases(rows, biased)
    found = ops.moe_w8a16(x, *routed, *up, *down, *bias, "silu", gated)
    expected = ops.moe(x.float(), *routed, up_exact, down_exact, *bias, "silu", gated)
    assert_close("moe_w8a16", found, expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 50])
@pytest.mark.parametrize(("gated", "biased", "zeros"), [(True, False, True), (False, True, False)])
def test_four_bit_experts(native, tokens, gated, biased, zeros, dtype):
    rows = 2 * HIDDEN if gated else HIDDEN
    up, up_exact = four_bit_experts(rows, INPUTS, zeros)
    down, down_exact = four_bit_experts(INPUTS, HIDDEN, zeros)
    x, routed, bias = torch.randn(tokens, INPUTS).to(dtype), routing(tokens), biases(rows, biased)
    found = ops.moe_w4a16(x, *routed, *up, *down, *bias, "gelu", gated)
    expected = ops.moe(x.float(), *routed, up_exact, down_exact, *bias, "gelu", gated)
    assert_close("moe_w4a16", found, expected.to(dtype))


def test_an_expert_that_no_token_is_sent_to_is_not_read(native):
    (up, _), (down, _) = int8_experts(HIDDEN, INPUTS), int8_experts(INPUTS, HIDDEN)
    up[1][-1] = float("nan")
    found = ops.moe_w8a16(
        torch.randn(9, INPUTS), *routing(9), *up, *down, None, None, "relu", False
    )
    assert found.isfinite().all()


def test_refusals():
    (up, _), (down, _) = int8_experts(HIDDEN, INPUTS), int8_experts(INPUTS, HIDDEN)
    index, weight = routing(3)
    rest = (None, None, "relu", False)
    with pytest.raises(KernelError, match=r"x \[T, K\] and two routings.*\[4, 32\]"):
        ops.moe_w8a16(torch.randn(4, INPUTS), index, weight, *up, *down, *rest)
    with pytest.raises(KernelError, match=r"weights \[E, out, in\]"):
        ops.moe_w8a16(torch.randn(3, INPUTS), index, weight, up[0][0], up[1], *down, *rest)
    with pytest.raises(KernelError, match="x must be float32"):
        ops.moe_w8a16(torch.ones(3, INPUTS).int(), index, weight, *up, *down, *rest)
    with pytest.raises(KernelError, match="unknown activation 'swish'"):
        ops.moe_w8a16(torch.randn(3, INPUTS), index, weight, *up, *down, None, None, "swish", False)


def test_opcheck(native):
    index, weight = routing(3)
    (up, _), (down, _) = int8_experts(2 * HIDDEN, INPUTS), int8_experts(INPUTS, HIDDEN)
    x, rest = torch.randn(3, INPUTS), (*biases(2 * HIDDEN, True), "silu", True)
    torch.library.opcheck(KERNELS["moe_w8a16"].overload, (x, index, weight, *up, *down, *rest))
    up, _ = four_bit_experts(2 * HIDDEN, INPUTS, True)
    down, _ = four_bit_experts(INPUTS, HIDDEN, True)
    torch.library.opcheck(KERNELS["moe_w4a16"].overload, (x, index, weight, *up, *down, *rest))
