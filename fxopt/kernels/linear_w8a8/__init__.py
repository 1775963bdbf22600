"""fxopt::linear_w8a8."""

from fxopt.kernels.linear_w8a8 import cpu
from fxopt.kernels.linear_w8a8.reference import linear_w8a8
from fxopt.kernels.registry import register_cuda

__all__ = ["cpu", "linear_w8a8"]

register_cuda("linear_w8a8", "fxopt.kernels.linear_w8a8.triton")
