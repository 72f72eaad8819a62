"""The router: i* = argmin_i (R |x|)_i, linear in |x|, predicts what each expert would leave unrepaired."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def choose_experts(x: Float[Tensor, "T H"], router: Float[Tensor, "E H"]) -> Int[Tensor, " T"]:
    """Top-1 expert of every token (ties go to the lower index)."""
    return (x.float().abs() @ router.float().T).argmin(dim=1)


def mean_residual(residual: Float[Tensor, "O I"]) -> Float[Tensor, " I"]:
    """A router row without training: mean over outputs of |residual|, so R|x| bounds the mean error
    (arXiv 2602.24059: "absolute mean to estimate the residual error")."""
    return residual.abs().mean(dim=0)


def regress_errors(
    x: Float[Tensor, "T H"], errors: Float[Tensor, "T E"], damping: float = 1e-2
) -> Float[Tensor, "E H"]:
    """The router whose R|x| is the least-squares prediction of the experts' measured errors.

    Closed form (ridge on |x|, damping relative to the mean diagonal), so still without training. Errors are
    centred per token: only the differences between experts decide.
    """
    magnitude = x.abs().double()
    target = errors.double()
    target = target - target.mean(dim=1, keepdim=True)
    gram = magnitude.T @ magnitude
    ridge = damping * gram.diagonal().mean()
    gram.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))  # an input that is all zero: any router will do
    solved: Tensor = torch.linalg.solve(gram, magnitude.T @ target)
    return solved.T.float().contiguous()
