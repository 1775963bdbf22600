"""fxopt::linear_w8a16."""

from fxopt.kernels.linear_w8a16.reference import linear_w8a16

__all__ = ["linear_w8a16"]
