"""fxopt::gated_activation."""

from fxopt.kernels.gated_activation.reference import gated_activation

__all__ = ["gated_activation"]
