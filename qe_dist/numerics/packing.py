"""Integer codes to int32 words and back, in the dense order of compressed-tensors `pack-quantized`.

Code k of a row, stored as code + 2^(b-1), occupies bits k*b .. k*b + b-1 of the row's bit string; bit n of
the string is bit n % 32 of word n // 32. For 4 bits: nibble i of word j is code 8j + i.
"""

import math

import torch
from jaxtyping import Int8, Int32
from torch import Tensor
from torch.nn.functional import pad


def num_words(columns: int, bits: int) -> int:
    """The int32 words of a row with so many codes."""
    return -(-columns * bits // 32)


def pack(codes: Int8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Rows are packed by the fewest codes that fill whole words: 8 codes a word at 4 bits, 32 codes 3 words at 3."""
    rows, columns = codes.shape
    shared = math.gcd(bits, 32)
    period = 32 // shared
    stored = pad(codes.view(torch.uint8) + 2 ** (bits - 1), (0, -columns % period))  # wraps around to code + 2^(b-1)
    lanes = stored.view(rows, -1, period)
    words = torch.zeros(rows, lanes.shape[1], bits // shared, dtype=torch.int32, device=codes.device)
    for lane in range(period):
        word, shift = divmod(lane * bits, 32)
        value = lanes[..., lane].to(torch.int32)
        words[..., word] |= value << shift
        if shift + bits > 32:
            words[..., word + 1] |= value >> (32 - shift)
    return words.view(rows, -1)[:, : num_words(columns, bits)]


def unpack(words: Int32[Tensor, "O W"], bits: int, columns: int) -> Int8[Tensor, "O I"]:
    """The exact inverse, without what fills the last word."""
    rows, offset = words.shape[0], 2 ** (bits - 1)
    if 8 % bits == 0:  # whole codes in each byte: 4 to 20 times as fast as words
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        fields = words.contiguous().view(torch.uint8)[..., None] >> shifts & (2**bits - 1)
        codes: Tensor = fields.flatten(1)[:, :columns] - offset  # wraps around to the code
        return codes.view(torch.int8)
    padded = pad(words.long() & 0xFFFF_FFFF, (0, -words.shape[1] % bits))
    groups = padded.view(rows, -1, bits)
    lanes = torch.empty(rows, groups.shape[1], 32, dtype=torch.int8, device=words.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = groups[..., word] >> shift
        if shift + bits > 32:
            value = value | (groups[..., word + 1] << (32 - shift))
        lanes[..., lane] = ((value & (2**bits - 1)) - offset).to(torch.int8)
    return lanes.view(rows, -1)[:, :columns].contiguous()
