"""fxopt::pack, unpack and lookup: codes of a few bits in bytes, and tables of values for them.

    byte stream of a row: code k occupies bits [k b, (k + 1) b), the lowest first
    lookup: y = table[block of the element, code]

Shapes: codes [..., n] <-> packed [..., ceil(n b / 8)] uint8; table [*block counts, entries].
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.ir.operators.quantization import block_counts, check_blocks
from fxopt.ir.operators.registration import define

# Eight codes of b bits fill b bytes.
_CODES = 8


def packed_length(length: Any, bits: int) -> Any:
    """The bytes that a row of `length` codes takes."""
    return (length * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 7:
        raise KernelError(f"codes of {bits} bits cannot be packed; 1 to 7 bits can.")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], of which the lowest bits count, as uint8 [..., ceil(n bits / 8)]."""
    _check_bits(bits)
    length = codes.shape[-1]
    if 8 % bits == 0 and length * bits % 8 == 0:
        return _pack_whole_bytes(codes, bits)
    masked = codes.to(torch.int64) & ((1 << bits) - 1)
    padded = torch.nn.functional.pad(masked, (0, -length % _CODES))
    eights = padded.unflatten(-1, (padded.shape[-1] // _CODES, _CODES))
    words = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for place in range(_CODES):
        words |= eights[..., place] << (bits * place)
    parts = [(words >> (8 * place)) & 255 for place in range(bits)]
    packed = torch.stack(parts, -1).to(torch.uint8).flatten(-2)
    return packed[..., : packed_length(length, bits)].contiguous()


def _pack_whole_bytes(codes: Tensor, bits: int) -> Tensor:
    count = 8 // bits
    values = codes.to(torch.uint8) & ((1 << bits) - 1)
    values = values.unflatten(-1, (codes.shape[-1] // count, count))
    packed = values[..., 0]
    for place in range(1, count):
        packed = packed | (values[..., place] << (bits * place))
    return packed.contiguous()


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    shape = (*codes.shape[:-1], packed_length(codes.shape[-1], bits))
    return codes.new_empty(shape, dtype=torch.uint8)


define("pack(Tensor codes, int bits) -> Tensor", pack_codes, _pack_fake)


def unpack_codes(packed: Tensor, bits: int, length: Any, signed: bool = False) -> Tensor:
    """The codes [..., length] of packed bytes: uint8, or int8 in two's complement if signed."""
    _check_bits(bits)
    if packed.shape[-1] != packed_length(length, bits):
        raise KernelError(
            f"{length} codes of {bits} bits take {packed_length(length, bits)} bytes; the packed "
            f"tensor {list(packed.shape)} has {packed.shape[-1]} in a row."
        )
    codes = _unpack_bytes(packed, bits) if 8 % bits == 0 else _unpack_words(packed, bits)
    codes = codes[..., :length].contiguous()
    # Shifting up and back carries the highest bit into the sign.
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits) if signed else codes


def _unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def _unpack_words(packed: Tensor, bits: int) -> Tensor:
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).to(torch.int64)
    groups = padded.unflatten(-1, (padded.shape[-1] // bits, bits))
    words = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=packed.device)
    for place in range(bits):
        words |= groups[..., place] << (8 * place)
    codes = torch.empty(*words.shape, _CODES, dtype=torch.uint8, device=packed.device)
    for place in range(_CODES):
        codes[..., place] = (words >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(-2)


def _unpack_fake(packed: Tensor, bits: int, length: Any, signed: bool) -> Tensor:
    dtype = torch.int8 if signed else torch.uint8
    return packed.new_empty((*packed.shape[:-1], length), dtype=dtype)


define(
    "unpack(Tensor packed, int bits, SymInt length, bool signed) -> Tensor",
    unpack_codes,
    _unpack_fake,
)


def _lookup(codes: Tensor, table: Tensor, block: Any) -> Tensor:
    check_blocks(codes, block)
    counts = block_counts(codes.shape, block)
    if list(table.shape[:-1]) != counts:
        raise KernelError(
            f"codes {list(codes.shape)} in blocks {list(block)} need a table {[*counts, 'entries']}"
            f", got {list(table.shape)}."
        )
    index = codes.to(torch.int32)
    if table.numel() > table.shape[-1]:
        first = torch.arange(0, table.numel(), table.shape[-1], device=codes.device).reshape(counts)
        for axis, (count, length) in enumerate(zip(counts, codes.shape, strict=True)):
            first = first.repeat_interleave(length // count if count else 1, axis)
        index = index + first.to(torch.int32)
    return table.reshape(-1)[index]


def _lookup_fake(codes: Tensor, table: Tensor, block: Any) -> Tensor:
    return codes.new_empty(codes.shape, dtype=table.dtype)


define("lookup(Tensor codes, Tensor table, SymInt[] block) -> Tensor", _lookup, _lookup_fake)
