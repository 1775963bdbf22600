"""fxopt::quantize_per_token."""

from fxopt.kernels.quantize_per_token.reference import quantize_per_token
from fxopt.kernels.registry import register_cuda

__all__ = ["quantize_per_token"]

register_cuda("quantize_per_token", "fxopt.kernels.quantize_per_token.triton")
