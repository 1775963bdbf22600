"""fxopt::moe_w8a16."""

from fxopt.kernels.moe_w8a16.reference import moe_w8a16

__all__ = ["moe_w8a16"]
