"""fxopt::dynamic_mlp_w8a8."""

from fxopt.kernels.dynamic_mlp_w8a8 import cpu
from fxopt.kernels.dynamic_mlp_w8a8.reference import dynamic_mlp_w8a8

__all__ = ["cpu", "dynamic_mlp_w8a8"]
