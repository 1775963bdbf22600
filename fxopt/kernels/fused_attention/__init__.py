"""fxopt::fused_attention."""

from fxopt.kernels.fused_attention.reference import fused_attention

__all__ = ["fused_attention"]
