"""fxopt::add_layer_norm."""

from fxopt.kernels.add_layer_norm.reference import add_layer_norm

__all__ = ["add_layer_norm"]
