"""From a quantized graph to kernels: one table per target, and the gate that times them."""

from fxopt.lowering.lower import Lowered, LoweringOptions, lower, resolve_target

__all__ = ["Lowered", "LoweringOptions", "lower", "resolve_target"]
