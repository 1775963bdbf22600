"""fxopt::apply_rope."""

from fxopt.kernels.apply_rope.reference import apply_rope

__all__ = ["apply_rope"]
