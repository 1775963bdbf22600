"""fxopt::embedding_int8."""

from fxopt.kernels.embedding_int8.reference import embedding_int8

__all__ = ["embedding_int8"]
