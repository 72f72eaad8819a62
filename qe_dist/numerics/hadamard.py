"""Orthogonal matrices that spread every channel evenly over others: randomized Hadamard, as products of small factors.

A `Mixing` is x -> (x * signs) (F_1 ⊗ F_2 ⊗ ...) on some of the channels, with random signs (QuaRot, arXiv 2404.00456,
section 3) and Hadamard factors divided by the root of their size. Multiplying by the factors in turn costs
n (f_1 + f_2 + ...) instead of n², and a matrix of size n is never built.

A width is a product of orders for which Paley's constructions over a prime field give a Hadamard matrix, and of
Sylvester's for the other powers of two: 1536 = 12 * 128, 3584 = 28 * 128, 29568 = 12 * 28 * 44 * 2. Where there
is none that is cheap (odd widths, 52, 92, ...) two mixings of the next smaller width that has one, over the first and
over the last channels, mix all of them [INF]; the matrix is orthogonal as well.

The same products serve at run time, where nothing can be fused offline (`online_factors`, `rotate_blocks`): without
signs, as in QuaRot, and a width that has none is rotated block by block, so that the blocks of a rank are its own.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

LARGEST_FACTOR = 128
"""Order of the largest Hadamard factor. Larger ones cost more multiplications, smaller ones more passes over memory.
Up to twice that is used where no smaller one divides the width: 18944 = 148 * 128."""
STRIP = 2**16
"""Entries that are in float64 at a time, few enough for the cache."""


@dataclass(frozen=True)
class Mixing:
    """A rotation of some channels among each other: random signs, then Hadamard factors."""

    channels: slice | Int[Tensor, " C"]
    signs: Float[Tensor, " C"]
    factors: tuple[Float[Tensor, "_ _"], ...]

    def __call__(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        return _kronecker(x * self.signs, self.factors)


@dataclass(frozen=True)
class Orthogonal:
    """A square orthogonal matrix R that does not mix channels of different bands; `r(x)` is x R."""

    mixings: tuple[Mixing, ...]
    bands: Int[Tensor, " N"]
    """The band of every channel."""

    def __call__(self, x: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
        """W may be a multiple of N: then R is the block of a block-diagonal matrix (one block per head)."""
        y: Tensor = x.double().unflatten(1, (-1, len(self.bands))).clone()
        for mix in self.mixings:
            y[..., mix.channels] = mix(y[..., mix.channels])
        return y.flatten(1)

    def common_gain(self, gain: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The part of a norm's gain that may stay before R: the geometric mean of every band."""
        size = torch.bincount(self.bands)
        return (torch.zeros(len(size)).double().index_add(0, self.bands, _octaves(gain)) / size).exp2()[self.bands]


def bands_of(gains: Float[Tensor, "L N"], octaves: float) -> Int[Tensor, " N"]:
    """The band of each channel. Channels are sorted into bands of so many octaves by the geometric mean of their gains;
    one band is centred on the median."""
    size = _octaves(gains).mean(dim=0)
    bands: Tensor = ((size - size.median()) / octaves).round().unique(return_inverse=True)[1]
    return bands


def randomized_hadamard(bands: Int[Tensor, " N"], random: torch.Generator) -> Orthogonal:
    """A random orthogonal matrix for these bands, in float64; the same generator state gives the same matrix."""
    mixings = []
    for band in range(int(bands.max()) + 1):
        channels = (bands == band).nonzero().flatten()
        width = len(channels)
        size = next(n for n in range(width, 0, -1) if orders(n) is not None)
        for part in (channels,) if size == width else (channels[:size], channels[-size:]):
            signs = torch.randint(2, (size,), generator=random).double() * 2 - 1
            mixings.append(Mixing(slice(None) if size == len(bands) else part, signs, unit(_factors(size))))
    return Orthogonal(tuple(mixings), bands)


Signs = tuple[Int8[Tensor, "_ _"], ...]
"""Hadamard matrices F_1, F_2, ... of +1 and -1; they stand for their Kronecker product over the root of its size."""


def online_factors(width: int) -> Signs:
    """Factors of the largest known Hadamard matrix whose size divides the width. Empty for an odd width."""
    size = next(n for n in range(width, 0, -1) if width % n == 0 and orders(n) is not None)
    return tuple(factor.to(torch.int8) for factor in _factors(size))


def unit(factors: Iterable[Tensor], dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, "_ _"], ...]:
    """Hadamard matrices scaled to orthogonal ones."""
    return tuple(factor.to(dtype) / math.sqrt(len(factor)) for factor in factors)


def rotate_blocks(x: Float[Tensor, "*B I"], factors: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "*B I"]:
    """x (H, H, ...), H the Kronecker product of orthogonal factors in the dtype of x, its size a divisor of I.

    A transform in as many steps as there are factors, I (f_1 + f_2 + ...) multiplications for a row instead of I².
    """
    if not factors:
        return x
    return _kronecker(x.unflatten(-1, (-1, block_size(factors))), factors).flatten(-2)


def rotate_weight(weight: Float[Tensor, "O I"], factors: Signs) -> Float[Tensor, "O I"]:
    """W (H, H, ...), for inputs that `rotate_blocks` rotates; computed in float64 and rounded once, to W's dtype."""
    exact = unit(factor.to(weight.device) for factor in factors)
    return _in_strips(weight, lambda rows: rotate_blocks(rows, exact), weight.dtype) if factors else weight


def block_size(factors: Iterable[Tensor]) -> int:
    """How many channels the product of these factors mixes; 1 without factors."""
    return math.prod(len(factor) for factor in factors)


def fused(
    weight: Float[Tensor, "O I"],
    rows: Orthogonal | None = None,
    columns: Orthogonal | None = None,
    gain: Float[Tensor, " I"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "O I"]:
    """R_rowsᵀ W diag(gain) R_columns, computed in float64 and rounded once, to `dtype`."""

    def read(x: Tensor) -> Tensor:
        x = x if gain is None else x * gain
        return x if columns is None else columns(x)

    if gain is not None or columns is not None:
        weight = _in_strips(weight, read, dtype if rows is None else torch.float64)
    if rows is not None:
        weight = _in_strips(weight.T, rows, dtype).T
    return weight.to(dtype).contiguous()


def _in_strips(
    matrix: Float[Tensor, "A B"], change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Float[Tensor, "A B"]:
    """A change of every row by itself, on few rows at a time: embeddings in float64 would fill the memory, too."""
    changed = matrix.new_empty(matrix.shape, dtype=dtype)
    size = max(1, STRIP // matrix.shape[1])
    for old, new in zip(matrix.split(size), changed.split(size), strict=True):
        new.copy_(change(old.double()))
    return changed


def _octaves(gain: Tensor) -> Tensor:
    return gain.double().abs().clamp_min(1e-6).log2()


def _kronecker(x: Float[Tensor, "*B C"], factors: Iterable[Tensor]) -> Float[Tensor, "*B C"]:
    """x (F_1 ⊗ F_2 ⊗ ...)"""
    for factor in factors:  # the first digit of the index goes to the end: after all they stand as before
        x = (x.unflatten(-1, (len(factor), -1)).transpose(-1, -2) @ factor).flatten(-2)
    return x


def _factors(width: int) -> tuple[Tensor, ...]:
    """Hadamard matrices of +1 and -1."""
    return tuple(paley(n) if n & (n - 1) else sylvester(n) for n in orders(width) or ())


@cache
def orders(width: int) -> tuple[int, ...] | None:
    """The orders of known Hadamard matrices whose Kronecker product has this width, small ones first; None where there
    are none."""
    if width == 1:
        return ()
    if width & (width - 1) == 0:
        last = min(width, LARGEST_FACTOR)
        return (*(orders(width // last) or ()), last)
    for order in range(12, min(width, 2 * LARGEST_FACTOR) + 1, 4):
        if width % order == 0 and order & (order - 1) and has_paley(order):
            rest = orders(width // order)
            if rest is not None:
                return (order, *rest)
    return None


def sylvester(order: int) -> Float[Tensor, "N N"]:
    """A Hadamard matrix whose order is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.kron(_matrix([1, 1], [1, -1]), h)
    return h


def has_paley(order: int) -> bool:
    """Whether the order is q + 1 with a prime q = 3 mod 4, or 2 (q + 1) with a prime q = 1 mod 4."""
    return order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1)))


def paley(order: int) -> Float[Tensor, "N N"]:
    """A Hadamard matrix of an order that has one (Paley, On orthogonal matrices, 1933)."""
    if _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    c = _conference(order // 2 - 1)
    return torch.kron(c, _matrix([1, 1], [1, -1])) + torch.kron(torch.eye(len(c)), _matrix([1, -1], [-1, -1]))


def _conference(q: int) -> Tensor:
    """C Cᵀ = q I with a zero diagonal: symmetric for q = 1 mod 4, skew for q = 3 mod 4. [q + 1, q + 1]"""
    residues = torch.full((q,), -1.0, dtype=torch.float64)
    residues[torch.arange(q) ** 2 % q] = 1.0
    residues[0] = 0.0
    i = torch.arange(q)
    c = torch.ones(q + 1, q + 1, dtype=torch.float64)
    c[0, 0] = 0.0
    c[1:, 1:] = residues[(i[:, None] - i) % q]
    c[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return c


def _matrix(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))
