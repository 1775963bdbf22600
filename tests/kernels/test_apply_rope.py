import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.apply_rope.reference import apply_rope
from tests.kernels.cases import DTYPE_IDS, FLOATING, strided
from tests.kernels.tolerances import assert_close

NAME = "apply_rope"
OP = KERNELS[NAME].overload


def angles(steps, r, *, interleaved, batch=1):
    position = torch.arange(steps)[None, :, None] + torch.arange(batch)[:, None, None]
    half = position * torch.logspace(0, -3, r // 2)
    full = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return full.cos()[:, None], full.sin()[:, None]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("b", "h", "s", "d", "r"),
    [(1, 1, 1, 2, 2), (2, 3, 5, 8, 8), (2, 3, 5, 9, 6), (1, 9, 130, 64, 64), (0, 2, 3, 4, 4)],
)
def test_agreement_with_the_reference(native, b, h, s, d, r, dtype, interleaved):
    x = torch.randn(b, s, h, d).to(dtype).transpose(1, 2)
    for batch in {1, b}:
        cos, sin = angles(s, r, interleaved=interleaved, batch=batch)
        for short in (torch.float32, dtype):
            cos, sin = cos.to(short), sin.to(short)
            expected = apply_rope(x, cos, sin, interleaved)
            assert_close(NAME, OP(x, cos, sin, interleaved), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(native, interleaved):
    cos, sin = angles(5, 8, interleaved=interleaved)
    x = torch.randn(2, 3, 5, 8)
    fused = torch.randn(2, 5, 3 * 24).view(2, 5, 3, 24)[..., 8:16].transpose(1, 2)
    for each in (x, strided(x), fused, x.transpose(0, 1), x[:, :1].expand(2, 3, 5, 8)):
        expected = apply_rope(each, cos, sin, interleaved)
        assert_close(NAME, OP(each, cos, sin, interleaved), expected)
        assert_close(NAME, OP(each, cos[0, 0], strided(sin[0, 0]), interleaved), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(run, interleaved):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    cos, sin = angles(40, 16, interleaved=interleaved)

    def turned(x, at):
        return run(NAME, x, cos[:, :, at : at + 1], sin[:, :, at : at + 1], interleaved)

    near = (turned(q, 9) * turned(k, 4)).sum()
    far = (turned(q, 38) * turned(k, 33)).sum()
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)
    assert (near - (q * k).sum()).abs() > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_lengths_are_kept_and_the_rest_passes(run, interleaved):
    cos, sin = angles(5, 6, interleaved=interleaved)
    x = torch.randn(2, 3, 5, 10)
    y = run(NAME, x, cos, sin, interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert not torch.equal(y[:, :, 1:, :6], x[:, :, 1:, :6])


def test_refusals(run):
    x = torch.randn(2, 3, 5, 8)
    with pytest.raises(KernelError, match=r"x must be \[B, H, S, D\]"):
        run(NAME, x[0], torch.ones(5, 8), torch.ones(5, 8), False)
    with pytest.raises(KernelError, match="R = 7 channels"):
        run(NAME, x, torch.ones(5, 7), torch.ones(5, 7), False)
    with pytest.raises(KernelError, match="R = 10 channels"):
        run(NAME, x, torch.ones(5, 10), torch.ones(5, 10), False)
    with pytest.raises(KernelError, match="cos and sin must have one shape"):
        run(NAME, x, torch.ones(5, 8), torch.ones(5, 6), False)
    with pytest.raises(RuntimeError, match="size"):
        run(NAME, x, torch.ones(4, 8), torch.ones(4, 8), False)


def test_opcheck(native):
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    cos, sin = angles(5, 6, interleaved=False)
    torch.library.opcheck(OP, (x, cos, sin, False))
    torch.library.opcheck(OP, (x.bfloat16(), cos, sin, True))
