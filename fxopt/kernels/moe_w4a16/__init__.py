"""fxopt::moe_w4a16."""

from fxopt.kernels.moe_w4a16.reference import moe_w4a16

__all__ = ["moe_w4a16"]
