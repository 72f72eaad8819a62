"""Integer codes to int32 words and back, in the dense order of compressed-tensors `pack-quantized`.

Code k of a row, stored as code + 2^(b-1), occupies bits k*b .. k*b + b-1 of the row's bit string; bit n of
the string is bit n % 32 of word n // 32. For 4 bits: nibble i of word j is code 8j + i.
"""

import torch
from jaxtyping import Int8, Int32
from torch import Tensor


def num_words(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def pack(codes: Int8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Bits of 32 codes fill exactly `bits` words, so rows are packed 32 codes at a time."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes.long() + 2 ** (bits - 1), (0, -columns % 32))
    lanes = padded.view(rows, -1, 32)
    words = torch.zeros(rows, lanes.shape[1], bits, dtype=torch.int64, device=codes.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = lanes[..., lane] << shift
        words[..., word] |= value & 0xFFFF_FFFF
        if shift + bits > 32:
            words[..., word + 1] |= value >> 32
    words = words.view(rows, -1)[:, : num_words(columns, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Int32[Tensor, "O W"], bits: int, columns: int) -> Int8[Tensor, "O I"]:
    rows = words.shape[0]
    padded = torch.nn.functional.pad(words.long() & 0xFFFF_FFFF, (0, -words.shape[1] % bits))
    groups = padded.view(rows, -1, bits)
    lanes = torch.empty(rows, groups.shape[1], 32, dtype=torch.int8, device=words.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = groups[..., word] >> shift
        if shift + bits > 32:
            value = value | (groups[..., word + 1] << (32 - shift))
        lanes[..., lane] = ((value & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)
    return lanes.view(rows, -1)[:, :columns].contiguous()
