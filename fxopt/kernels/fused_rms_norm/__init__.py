"""fxopt::fused_rms_norm."""

from fxopt.kernels.fused_rms_norm.reference import fused_rms_norm

__all__ = ["fused_rms_norm"]
