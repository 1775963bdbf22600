import pytest
import torch

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.embedding_int8.reference import embedding_int8
from tests.kernels.cases import DTYPE_IDS, FLOATING, int8, strided
from tests.kernels.tolerances import assert_close

NAME = "embedding_int8"
OP = KERNELS[NAME].overload


@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 5), (2, 3, 70)])
@pytest.mark.parametrize("width", [1, 33, 96])
def test_agreement_with_the_reference(native, shape, width, dtype):
    weight, scale = int8(50, width), torch.rand(50)
    indices = torch.randint(0, 50, shape)
    expected = embedding_int8(weight, scale, indices, dtype)
    assert_close(NAME, OP(weight, scale, indices, dtype), expected)
    assert_close(NAME, OP(strided(weight), strided(scale), indices.int(), dtype), expected)


def test_it_is_the_dequantized_table(run):
    weight, scale = int8(9, 4), torch.rand(9)
    y = run(NAME, weight, scale, torch.arange(9), torch.float32)
    assert torch.equal(y, weight * scale[:, None])


@pytest.mark.parametrize("width", [1, 40])
def test_short_types_round_half_to_even(run, width):
    for dtype, half_ulp in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        scale = 1.0 + half_ulp * torch.arange(8)
        y = run(NAME, torch.ones(8, width, dtype=torch.int8), scale, torch.arange(8), dtype)
        units = (y.double() - 1.0) / (2 * half_ulp)
        assert units[:, 0].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
        assert torch.equal(units, units[:, :1].expand(8, width))


@pytest.mark.parametrize("index", [-1, 9, 2**40])
def test_bad_indices_raise(run, index):
    with pytest.raises(IndexError):
        run(NAME, int8(9, 4), torch.rand(9), torch.tensor([0, index]), torch.float32)


def test_refusals(run):
    weight, scale, indices = int8(9, 4), torch.rand(9), torch.tensor([1])
    with pytest.raises(KernelError, match="weight must be int8"):
        run(NAME, weight.float(), scale, indices, torch.float32)
    with pytest.raises(KernelError, match="scale must be float32 with V = 9"):
        run(NAME, weight, scale[:8], indices, torch.float32)
    with pytest.raises(KernelError, match="indices must be int64 or int32"):
        run(NAME, weight, scale, indices.float(), torch.float32)
    with pytest.raises(KernelError, match="dtype must be"):
        run(NAME, weight, scale, indices, torch.int8)


def test_opcheck(native):
    args = (int8(9, 4), torch.rand(9), torch.tensor([[1, 2, 3]]), torch.bfloat16)
    torch.library.opcheck(OP, args)
