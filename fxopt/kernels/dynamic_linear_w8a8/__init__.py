"""fxopt::dynamic_linear_w8a8."""

from fxopt.kernels.dynamic_linear_w8a8 import cpu
from fxopt.kernels.dynamic_linear_w8a8.reference import dynamic_linear_w8a8
from fxopt.kernels.registry import register_cuda

__all__ = ["cpu", "dynamic_linear_w8a8"]

register_cuda("dynamic_linear_w8a8", "fxopt.kernels.dynamic_linear_w8a8.triton")
