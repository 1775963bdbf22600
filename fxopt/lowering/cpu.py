"""The CPU table: which kernels stand for which operators, in the order they are tried."""

from fxopt.lowering.elementwise import (
    AddLayerNorm,
    ApplyRope,
    FusedAttention,
    FusedRmsNorm,
    GeluGate,
    SiluGate,
)
from fxopt.lowering.experts import FourBitExperts, Int8Experts
from fxopt.lowering.feed_forward import GatedMlp, Mlp
from fxopt.lowering.four_bit import FourBitLinear
from fxopt.lowering.norm_quantize import QuantizeInNorm
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
    FourBitLinear(),
    Int8Experts(),
    FourBitExperts(),
    Int8Embedding(),
)
PROLOGUES: tuple[LoweringRule, ...] = (DynamicPreScale(), StaticPreScale())
EPILOGUES: tuple[LoweringRule, ...] = (FuseGelu(), FuseRelu(), FuseSilu())
ELEMENTWISE: tuple[LoweringRule, ...] = (
    FusedRmsNorm(),
    AddLayerNorm(),
    ApplyRope(),
    FusedAttention(),
    SiluGate(),
    GeluGate(),
)
BLOCKS: tuple[LoweringRule, ...] = (GatedMlp(), Mlp())
PRODUCERS: tuple[LoweringRule, ...] = (QuantizeInNorm(),)
