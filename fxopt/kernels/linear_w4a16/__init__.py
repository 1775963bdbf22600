"""fxopt::linear_w4a16."""

from fxopt.kernels.linear_w4a16.reference import linear_w4a16

__all__ = ["linear_w4a16"]
