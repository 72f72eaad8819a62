"""The best low-rank repair of an error, in the metric of the inputs that it meets.

min over rank-r L of ||(E - L) X||_F has the solution L = U_r (U_r^T E), with U_r the top r eigenvectors of
E G E^T and G the Gram matrix of the inputs. It equals [E S]_r S^-1 for any S S^T = G
(ASER, QERA-exact, EoRA), needs no inverse and holds for singular G, so the few tokens of one expert can
be used as they are: E G E^T = (E X^T)(E X^T)^T.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.determinism import tensor_cores
from qe_dist.core.errors import NumericalError

OVERSAMPLE = 8
STEPS = 8
ROUGH = 6
"""The number of first steps in which a GPU may use tensor cores. The last steps and the projection correct their
rounding, even where one channel is ten thousand times as large as the others; with all steps rough the error there is
25 % larger."""


def gram_product(gram: Float[Tensor, "I I"]) -> Callable[[Tensor], Tensor]:
    """v -> G v, for the metric of `low_rank`."""
    return lambda v: gram @ v


def diagonal_product(diagonal: Float[Tensor, " I"]) -> Callable[[Tensor], Tensor]:
    """v -> D v: the product with a Gram matrix whose channels are taken as uncorrelated."""
    return lambda v: diagonal[:, None] * v


def token_product(x: Float[Tensor, "T I"]) -> Callable[[Tensor], Tensor]:
    """v -> X^T (X v): the Gram matrix of these tokens without forming it."""
    return lambda v: x.T @ (x @ v)


def low_rank(
    error: Float[Tensor, "O I"],
    times_gram: Callable[[Tensor], Tensor],
    rank: int,
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """(up, down) of the best rank-r repair, by block subspace iteration; rank is cut at min(O, I).

    Starts from fixed pseudo-random vectors, so equal inputs give equal bits.
    """
    outputs, inputs = error.shape
    rank = min(rank, outputs, inputs)
    width = min(rank + OVERSAMPLE, outputs, inputs)
    # One number scales the problem: squares of a small E G E^T would underflow in float32.
    size = error.abs().max()
    if not torch.isfinite(size):
        raise NumericalError("the rounding error has a NaN or Inf")
    if rank == 0 or size == 0:
        return error.new_zeros(outputs, rank), error.new_zeros(rank, inputs)
    unit = error / size

    def step(q: Tensor) -> Tensor:
        return unit @ times_gram(unit.T @ q)

    fixed = torch.Generator(error.device).manual_seed(0)
    basis = torch.randn(outputs, width, generator=fixed, device=error.device).to(error)
    for turn in range(STEPS):
        with tensor_cores() if turn < ROUGH else nullcontext():
            image = step(basis)
        basis = _orthonormal(image)
    small = basis.T @ step(basis)
    if not torch.isfinite(small).all():
        raise NumericalError("the Gram matrix has a NaN or Inf")
    vectors = torch.linalg.eigh((small + small.T).double() / 2).eigenvectors.flip(1)[:, :rank]
    up = basis @ vectors.to(basis)
    return up, up.T @ error


def low_rank_floats(outputs: int, inputs: int, rank: int) -> int:
    """Numbers at most that `low_rank` holds at once: the error, its scaled copy, and some bases and their images."""
    return 2 * outputs * inputs + 8 * (rank + OVERSAMPLE) * (outputs + inputs)


def _orthonormal(columns: Tensor) -> Tensor:
    if not torch.isfinite(columns).all():
        raise NumericalError("subspace iteration met a NaN or Inf")
    basis = cholesky_qr(columns) if columns.is_cuda else None
    if basis is None:
        basis = torch.linalg.qr(columns).Q
    return basis


INDEPENDENT = 1e-4
"""`cholesky_qr` is exact to float32 if at least this share of each column is independent of the columns before it."""


def cholesky_qr(columns: Float[Tensor, "O R"]) -> Float[Tensor, "O R"] | None:
    """The Q of a QR decomposition by matrix products alone, in float64; None where columns are too nearly dependent.

    On a GPU a tenth of the time of Householder's reflections, which go column by column.
    """
    tall = (columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(columns.dtype).tiny)).double()
    factor, failed = torch.linalg.cholesky_ex(tall.T @ tall)
    if failed or factor.diagonal().min() < INDEPENDENT:
        return None
    basis: Tensor = torch.linalg.solve_triangular(factor.T, tall, upper=True, left=False)
    return basis.to(columns)


def fit_up(
    error: Float[Tensor, "O I"], times_gram: Callable[[Tensor], Tensor], down: Float[Tensor, "R I"]
) -> Float[Tensor, "O R"]:
    """The up matrix that goes best with a given down matrix: U = E G D^T (D G D^T)^-1 minimises ||(E - U D) X||_F.

    After D was rounded to its stored form, this U makes up for a part of what rounding lost.
    """
    seen = times_gram(down.T)
    product, target = (down @ seen).double(), (error @ seen).double()
    size = product.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    ridge = 1e-6 * torch.eye(len(down), dtype=product.dtype, device=product.device)
    up: Tensor = torch.linalg.solve(product / size / size[:, None] + ridge, target / size, left=False) / size
    if not torch.isfinite(up).all():
        raise NumericalError("fitting the up matrix met a NaN or Inf")
    return up.to(error)


PAPER_WIDTH = 1536
"""Hidden size of the narrowest model in the Quant Experts paper, Qwen2-VL-2B."""


def capped(width: int, asked: int) -> int:
    """A rank or channel count for a layer of this width: as asked, but on layers narrower than any published
    one the same share of the width as on Qwen2-VL-2B, where 32 of 1536 channels is a 48th."""
    return max(1, min(asked, asked * width // PAPER_WIDTH))
