"""Packed codes and tables: exact there and back, and the bits where the format says they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt.ir.operators as operators
from fxopt.errors import KernelError, RecipeError
from fxopt.ir.number_formats import FORMATS, codebook_format

ops = torch.ops.fxopt
lengths = st.integers(0, 41)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 7), rows=st.integers(0, 5), length=lengths, seed=st.integers(0, 999))
def test_unpacking_gives_back_what_was_packed(bits, rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, length), generator=generator).to(torch.uint8)
    packed = ops.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, operators.packed_length(length, bits))
    assert torch.equal(ops.unpack(packed, bits, length, False), codes)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(ops.unpack(ops.pack(signed, bits), bits, length, True), signed)


@pytest.mark.parametrize("bits", range(1, 8))
def test_code_k_lies_at_bit_k_b(bits):
    codes = torch.randint(0, 1 << bits, (19,), dtype=torch.uint8)
    stream = 0
    for k, code in enumerate(codes.tolist()):
        stream |= code << (bits * k)
    expected = stream.to_bytes(operators.packed_length(19, bits), "little")
    assert bytes(ops.pack(codes, bits).tolist()) == expected


def test_a_row_is_packed_by_itself():
    codes = torch.randint(0, 8, (4, 13), dtype=torch.uint8)
    packed = ops.pack(codes, 3)
    assert torch.equal(ops.unpack(packed[2:3], 3, 13, False), codes[2:3])


def test_lookup_by_block():
    codes = torch.randint(0, 4, (6, 8), dtype=torch.uint8)
    for block, counts in (([-1, -1], (1, 1)), ([2, 4], (3, 2)), ([1, -1], (6, 1))):
        table = torch.randn(*counts, 4)
        found = ops.lookup(codes, table, block)
        for i in range(6):
            for j in range(8):
                entry = table[i * counts[0] // 6, j * counts[1] // 8, int(codes[i, j])]
                assert found[i, j] == entry


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(KernelError, match="9 bits cannot be packed"):
        ops.pack(torch.zeros(3, dtype=torch.uint8), 9)
    with pytest.raises(KernelError, match="take 4 bytes; the packed tensor"):
        ops.unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 8, False)
    with pytest.raises(KernelError, match="need a table"):
        ops.lookup(torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(1, 1, 4), [1, -1])
    with pytest.raises(RecipeError, match="no fixed table"):
        FORMATS["int4"].codebook()


def test_operators_are_well_formed():
    codes = torch.randint(0, 8, (3, 11), dtype=torch.uint8)
    torch.library.opcheck(ops.pack.default, (codes, 3))
    torch.library.opcheck(ops.unpack.default, (ops.pack(codes, 3), 3, 11, True))
    torch.library.opcheck(ops.lookup.default, (codes, torch.randn(1, 1, 8), [-1, -1]))


def test_formats_have_room_for_their_codes():
    for formats in (FORMATS.values(), map(codebook_format, range(1, 8))):
        for found in formats:
            low, high = found.range(True)
            assert -low == high or found.kind == "codebook"
            if found.kind == "integer":
                assert found.range(False) == (-(2 ** (found.bits - 1)), 2 ** (found.bits - 1) - 1)


def test_normal_float_is_the_published_table():
    """Dettmers et al., QLoRA, appendix E."""
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    assert torch.allclose(FORMATS["nf4"].codebook(), torch.tensor(published), atol=2e-6)
