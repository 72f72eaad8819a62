"""Storage of low-rank factors: bf16, or 8 or 4 bits with one scale per row.

A row has one scale at 4 bits as well: at equal bytes on the bundled model, scales for every 32 or 64 columns
lower the error by 3 % at most.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import Factor
from qe_dist.numerics.lowrank import fit_up, low_rank

FACTOR_BITS = (4, 8, 16)


def store_factor(matrix: Float[Tensor, "*rows columns"], bits: int) -> Factor:
    """The matrix as stored in so many bits. 16: bf16. 8: int8 with a bf16 scale per row, max|row| / 127. 4: two codes
    to a byte, scale max|row| / 7; ConfigError for an odd number of columns."""
    if bits == 16:
        return Factor(matrix.to(torch.bfloat16))
    top = 2 ** (bits - 1) - 1
    scale = (matrix.abs().amax(dim=-1) / top).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.round(matrix / scale.to(matrix.dtype)[..., None]).clamp(-top, top)
    return Factor(_pairs(codes) if bits == 4 else codes.to(torch.int8), scale)


def _pairs(codes: Tensor) -> Tensor:
    """4-bit codes of two neighbouring columns packed into each byte, see `Factor`. ConfigError for an odd number."""
    if codes.shape[-1] % 2:
        raise ConfigError(
            f"4-bit factors hold two columns to a byte and cannot hold {codes.shape[-1]}; choose factor_bits = 8"
        )
    pairs: Tensor = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    low, high = pairs.unbind(-1)
    return low | (high << 4)


def adapter(
    error: Float[Tensor, "O I"], times_gram: Callable[[Tensor], Tensor], rank: int, bits: int
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """(up, down) of the best repair of this rank when its factors are stored in so many bits. At 4 bits rounding `down`
    costs much, so `up` is fitted to the rounded `down`."""
    up, down = low_rank(error, times_gram, rank)
    if bits == 4 and down.numel():
        up = fit_up(error, times_gram, store_factor(down, bits).dense.to(down))
    return up, down


def even_rank(
    up: Float[Tensor, "*experts O R"], down: Float[Tensor, "*experts R I"]
) -> tuple[Float[Tensor, "*experts O S"], Float[Tensor, "*experts S I"]]:
    """The pair with zeros added where its rank is odd: at 4 bits, two columns of `up` share a byte."""
    return (pad(up, (0, 1)), pad(down, (0, 0, 0, 1))) if up.shape[-1] % 2 else (up, down)


def row_scale_bits(factor_bits: int) -> int:
    """Bits of the scale of each row of a factor: none where factors are stored in bf16."""
    return 0 if factor_bits == 16 else 16


def rank_within(bits: float, outputs: int, inputs: int, factor_bits: int, copies: int = 1) -> int:
    """The largest rank at which `copies` pairs [outputs, R] and [R, inputs] take at most so many bits (4: even)."""
    scale_bits = row_scale_bits(factor_bits)
    spare = bits - copies * outputs * scale_bits
    rank = max(0, int(spare / (copies * (factor_bits * (outputs + inputs) + scale_bits))))
    return rank - rank % 2 if factor_bits == 4 else rank


def pair_bits(rank: int, outputs: int, inputs: int, factor_bits: int, copies: int = 1) -> int:
    """Stored bits of `copies` pairs [outputs, rank] and [rank, inputs], scales included; at 4 bits of an even rank."""
    scale_bits = row_scale_bits(factor_bits)
    rank += rank % 2 if factor_bits == 4 else 0
    return copies * (rank * (factor_bits * (outputs + inputs) + scale_bits) + outputs * scale_bits)


def columns_within(bits: float, outputs: int, factor_bits: int) -> int:
    """The largest even number of columns [outputs, C] that take at most so many bits, see `column_bits`."""
    empty, two = column_bits(0, outputs, factor_bits), column_bits(2, outputs, factor_bits)
    return 2 * max(0, int((bits - empty) / (two - empty)))


def column_bits(count: int, outputs: int, factor_bits: int) -> int:
    """Stored bits of so many columns: codes, scales, and 32-bit indices of their channels."""
    return count * (factor_bits * outputs + 32) + row_scale_bits(factor_bits) * outputs
