import pytest
import torch
from torch.nn import functional

from fxopt.errors import KernelError
from fxopt.kernels.activation import ACTIVATIONS, activation_function
from tests.kernels.cases import ACTIVATIONS as NAMES


def test_the_names():
    assert tuple(ACTIVATIONS) == NAMES


def test_the_functions():
    x = torch.randn(100)
    assert activation_function("none")(x) is x
    assert torch.equal(activation_function("gelu_tanh")(x), functional.gelu(x, approximate="tanh"))
    assert torch.equal(activation_function("quick_gelu")(x), x * torch.sigmoid(1.702 * x))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(KernelError, match="'selu'; valid: none, relu, gelu, gelu_tanh, silu"):
        activation_function("selu")
