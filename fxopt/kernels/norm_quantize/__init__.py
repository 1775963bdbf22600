"""fxopt::norm_quantize."""

from fxopt.kernels.norm_quantize.reference import norm_quantize

__all__ = ["norm_quantize"]
