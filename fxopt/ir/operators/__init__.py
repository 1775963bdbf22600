"""The `fxopt::` operators that a captured or quantized program is written in.

Each is a `torch.library` operator with a plain torch reference, which runs on every device, and
a fake implementation, so that a program can be exported and compiled at every level. Operators
that only lowering writes live in `fxopt.kernels`.
"""

from fxopt.ir.operators.attention import attention_mask, attention_reference, merge_masks
from fxopt.ir.operators.cache import pack_bits, unpack_bits
from fxopt.ir.operators.hadamard import hadamard_reference
from fxopt.ir.operators.moe import ACTIVATIONS, activate
from fxopt.ir.operators.quantization import block_counts
from fxopt.ir.operators.rope import rope_reference

__all__ = [
    "ACTIVATIONS",
    "activate",
    "attention_mask",
    "attention_reference",
    "block_counts",
    "hadamard_reference",
    "merge_masks",
    "pack_bits",
    "rope_reference",
    "unpack_bits",
]
