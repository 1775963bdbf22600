import pytest
import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels import KERNELS
from fxopt.kernels.linear_w4a16.reference import linear_w4a16
from tests.kernels.cases import ACTIVATIONS, DTYPE_IDS, FLOATING, LINEAR_SHAPES, strided
from tests.kernels.tolerances import assert_close

NAME = "linear_w4a16"
OP = KERNELS[NAME].overload
INTEGERS = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)


def four_bit_weight(n: int, k: int, groups: int = 1, asymmetric: bool = False):
    """Codes, scale, zero point and bias of a weight [n, k] whose outputs are of order one."""
    codes = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)
    scale = (torch.rand(n, groups) + 0.5) / (4.6 * max(k, 1) ** 0.5)
    zero = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if asymmetric else None
    return codes, scale, zero, torch.randn(n)


def outliers_of(n: int, k: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` outliers at positions that may fall on one element twice, by row."""
    rows = torch.randint(0, n, (count,)).sort().values
    start = torch.searchsorted(rows, torch.arange(n + 1)).int()
    return start, torch.randint(0, k, (count,)).int(), 3 * torch.randn(count)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", FLOATING, ids=DTYPE_IDS)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR_SHAPES)
def test_agreement_with_the_reference(native, lead, k, n, dtype, asymmetric):
    codes, scale, zero, bias = four_bit_weight(n, k, 1, asymmetric)
    x = torch.randn(*lead, k).to(dtype)
    expected = linear_w4a16(x, codes, scale, zero, bias, "gelu", INTEGERS)
    for each in (x, strided(x)):
        found = OP(each, codes, scale, zero, bias, "gelu", INTEGERS, None, None, None)
        assert_close(NAME, found, expected)


@pytest.mark.parametrize("group", [32, 64, 128, 24, 1])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 33])
def test_groups(native, m, group):
    k, n = 384, 70
    codes, scale, zero, bias = four_bit_weight(n, k, k // group, True)
    table, x = torch.randn(16), torch.randn(m, k)
    for points in (zero, None):
        expected = linear_w4a16(x, codes, scale, points, bias, "none", table)
        found = OP(x, codes, scale, points, bias, "none", table, None, None, None)
        assert_close(NAME, found, expected)


@pytest.mark.parametrize("k", [33, 64, 200])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_outliers(native, m, k):
    codes, scale, _, bias = four_bit_weight(70, k)
    x = torch.randn(m, k)
    for count in (0, 1, 200):
        outliers = outliers_of(70, k, count)
        expected = linear_w4a16(x, codes, scale, None, bias, "none", INTEGERS, *outliers)
        found = OP(x, codes, scale, None, bias, "none", INTEGERS, *outliers)
        assert_close(NAME, found, expected)


def test_the_reference_is_the_equation():
    codes, scale, zero, bias = four_bit_weight(5, 12, 3, True)
    x, table = torch.randn(2, 12, dtype=torch.float64), torch.randn(16)
    start, column, value = outliers_of(5, 12, 7)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for row in range(2):
        for n in range(5):
            total = float(bias[n])
            for k in range(12):
                code = (int(codes[n, k // 2]) >> (4 * (k % 2))) & 15
                w = float(scale[n, k // 4]) * (float(table[code]) - int(zero[n, k // 4]))
                for i in range(int(start[n]), int(start[n + 1])):
                    w += float(value[i]) if int(column[i]) == k else 0.0
                total += float(x[row, k]) * w
            expected[row, n] = total
    found = linear_w4a16(x, codes, scale, zero, bias, "none", table, start, column, value)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 6, 40])
def test_activations(native, m, activation):
    codes, scale, _, bias = four_bit_weight(131, 64, 2)
    x = torch.randn(m, 64)
    for each in (bias, None):
        expected = linear_w4a16(x, codes, scale, None, each, activation, INTEGERS)
        found = OP(x, codes, scale, None, each, activation, INTEGERS, None, None, None)
        assert_close(NAME, found, expected)


@pytest.mark.parametrize("m", [2, 20])
def test_nan_stays_in_its_row(native, m):
    codes, scale, zero, bias = four_bit_weight(70, 64, 2, True)
    x = torch.randn(m, 64)
    x[1, 5] = float("nan")
    y = OP(x, codes, scale, zero, bias, "none", INTEGERS, None, None, None)
    assert y[1].isnan().all()
    assert y[torch.arange(m) != 1].isfinite().all()


def test_refusals(run):
    codes, scale, zero, bias = four_bit_weight(7, 32, 2, True)
    x = torch.randn(3, 32)
    plain = (INTEGERS, None, None, None)
    with pytest.raises(KernelError, match="unknown activation 'tanh'; valid: none, relu, gelu"):
        run(NAME, x, codes, scale, zero, bias, "tanh", *plain)
    with pytest.raises(KernelError, match=r"codes must be uint8 \[N, 15\] for K = 30"):
        run(NAME, x[:, :30], codes, scale, zero, bias, "none", *plain)
    with pytest.raises(KernelError, match="x must be float32"):
        run(NAME, x.int(), codes, scale, zero, bias, "none", *plain)
    with pytest.raises(KernelError, match="G a divisor of K = 32"):
        run(NAME, x, codes, torch.ones(7, 3), None, bias, "none", *plain)
    with pytest.raises(KernelError, match="zero_point must be int8"):
        run(NAME, x, codes, scale, zero.int(), bias, "none", *plain)
    with pytest.raises(KernelError, match="table must be float32 with 16 values"):
        run(NAME, x, codes, scale, zero, bias, "none", INTEGERS[:8], None, None, None)
    with pytest.raises(KernelError, match="bias must have N = 7 elements"):
        run(NAME, x, codes, scale, zero, bias[:3], "none", *plain)
    start, column, value = outliers_of(7, 32, 4)
    with pytest.raises(KernelError, match="come together or not at all"):
        run(NAME, x, codes, scale, zero, bias, "none", INTEGERS, start, None, None)
    with pytest.raises(KernelError, match="N \\+ 1 = 8 elements"):
        run(NAME, x, codes, scale, zero, bias, "none", INTEGERS, start[1:], column, value)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize(
    ("start", "column", "message"),
    [
        ([0, 1, 1, 3], [0, 5, 32], "outlier_column must lie in .0, K. with K = 32"),
        ([0, 1, 1, 3], [0, -1, 31], "outlier_column must lie in .0, K. with K = 32"),
        ([1, 1, 1, 3], [0, 5, 31], "must rise from 0 to the number of outliers, 3"),
        ([0, 1, 1, 4], [0, 5, 31], "must rise from 0 to the number of outliers, 3"),
        ([0, 9, 1, 3], [0, 5, 31], "must rise from 0 to the number of outliers, 3"),
        ([0, -9, 1, 3], [0, 5, 31], "must rise from 0 to the number of outliers, 3"),
    ],
)
def test_outliers_outside_the_weight_are_refused(run, start, column, message, m):
    codes, scale, _, bias = four_bit_weight(3, 32)
    places = (torch.tensor(start).int(), torch.tensor(column).int(), torch.ones(3))
    with pytest.raises(KernelError, match=message):
        run(NAME, torch.randn(m, 32), codes, scale, None, bias, "none", INTEGERS, *places)


def test_opcheck(native):
    codes, scale, zero, bias = four_bit_weight(7, 32, 2, True)
    x = torch.randn(3, 32)
    torch.library.opcheck(
        OP, (x, codes, scale, zero, bias, "gelu", INTEGERS, *outliers_of(7, 32, 4))
    )
