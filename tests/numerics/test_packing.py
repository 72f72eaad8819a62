"""Codes to words and back, and the same words as compressed-tensors packs."""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.numerics.packing import num_words, pack, unpack


@st.composite
def coded(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(codes, bits), odd widths among them."""
    bits, rows, columns = draw(st.integers(2, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, (rows, columns), generator=random, dtype=torch.int8), bits


@given(coded())
def test_unpack_is_the_inverse_of_pack(pair: tuple[Tensor, int]) -> None:
    codes, bits = pair
    words = pack(codes, bits)
    assert words.shape == (codes.shape[0], num_words(codes.shape[1], bits))
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)


@given(coded())
def test_words_are_those_of_compressed_tensors(pair: tuple[Tensor, int]) -> None:
    codes, bits = pair
    words = pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits, codes.shape[1]), unpack_from_int32(words, bits, codes.shape))


def test_all_codes_survive_at_all_bits() -> None:
    for bits in range(2, 9):
        codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)[None]
        assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


def test_a_word_of_four_bit_codes_by_hand() -> None:
    """Nibble i of word j is code 8j + i, stored as code + 8; missing codes are zero bits."""
    codes = torch.tensor([[-8, -7, -6, 0, 1, 2, 3, 7, 5, -1]], dtype=torch.int8)
    low, high = pack(codes, 4)[0].tolist()
    assert low & 0xFFFF_FFFF == 0xFBA98210
    assert high == 0x7D


def test_a_code_may_lie_across_two_words() -> None:
    """Code 10 of 3 bits has bits 30..32: its last bit is bit 0 of the second word."""
    codes = torch.full((1, 11), -4, dtype=torch.int8)
    codes[0, 10] = 3
    low, high = pack(codes, 3)[0].tolist()
    assert (low & 0xFFFF_FFFF, high) == (0b11 << 30, 1)


def test_words_needed() -> None:
    assert [num_words(8, 4), num_words(9, 4), num_words(11, 3), num_words(32, 3), num_words(1, 8)] == [1, 2, 2, 3, 1]
