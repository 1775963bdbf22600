"""The CUDA table: Triton kernels, reached from the same graph."""

from fxopt.lowering.experts import Int8Experts
from fxopt.lowering.pre_scale import DynamicPreScale, StaticPreScale
from fxopt.lowering.quantized import (
    DynamicLinear,
    FuseGelu,
    FuseRelu,
    FuseSilu,
    Int8Embedding,
    StaticLinear,
    WeightOnlyLinear,
)
from fxopt.lowering.rule import LoweringRule

INTEGER: tuple[LoweringRule, ...] = (
    DynamicLinear(),
    StaticLinear(),
    WeightOnlyLinear(),
    Int8Experts(),
    Int8Embedding(),
)
PROLOGUES: tuple[LoweringRule, ...] = (DynamicPreScale(), StaticPreScale())
EPILOGUES: tuple[LoweringRule, ...] = (FuseGelu(), FuseRelu(), FuseSilu())
