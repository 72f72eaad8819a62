"""Which channels matter together: co-occurrence, NPMI, spectral clusters (Quant Experts, step e)."""

import warnings
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.stats import GroupStats

RankBy = Literal["frequency", "mean"]


def top_channels(x: Float[Tensor, "T I"], importance: Float[Tensor, " I"], k: int) -> Bool[Tensor, "T I"]:
    """The k channels of each token with the largest |x| * importance."""
    score = x.abs() * importance
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    return mask.scatter_(1, score.topk(min(k, x.shape[1]), dim=1).indices, True)


def split_channels(
    frequency: Float[Tensor, " I"], shared: int, routed: int
) -> tuple[Int[Tensor, " S"], Int[Tensor, " R"]]:
    """Channels ranked by how often (or how much) they matter: the first ones for every token, the next for some."""
    order = frequency.argsort(descending=True, stable=True)
    return order[:shared], order[shared : shared + routed]


def outlier_channels(stats: GroupStats, rank_by: RankBy, k: int) -> Int[Tensor, " K"]:
    """The k channels (fewer on narrow layers) that matter most: by how often each is among the k most important
    ones of a token (Quant Experts, needs top_channels = k), or by mean|x| * mean|W| (ASER).

    Smoothing changes neither score: what x loses, W gains.
    """
    score = stats.frequency(k) if rank_by == "frequency" else stats.mean_abs * stats.importance
    return split_channels(score, capped(score.numel(), k), 0)[0]


def npmi(occurs: Bool[Tensor, "T C"]) -> Float[Tensor, "C C"]:
    """Normalised pointwise mutual information, log(p_ij / (p_i p_j)) / -log p_ij, in -1..1.

    -1 where two channels never occur together, 1 where they only occur together (and on the diagonal).
    """
    o = occurs.double()
    joint = (o.T @ o) / max(1, o.shape[0])
    single = joint.diagonal()
    tiny = torch.finfo(torch.float64).tiny
    value = torch.log(joint.clamp_min(tiny) / (single[:, None] * single).clamp_min(tiny))
    value = value / -torch.log(joint.clamp_min(tiny))
    value = torch.where(joint >= 1, torch.ones_like(value), value)  # both in every token
    value = torch.where(joint > 0, value, -torch.ones_like(value))
    value.fill_diagonal_(1.0)
    return value.clamp(-1, 1)


def cluster_channels(occurs: Bool[Tensor, "T C"], num_clusters: int, seed: int) -> Int[Tensor, " C"]:
    """Cluster of every channel by spectral clustering of the NPMI, shifted to 0..1 (Laplacian needs >= 0)."""
    from sklearn.cluster import SpectralClustering
    from threadpoolctl import threadpool_limits

    channels = occurs.shape[1]
    if channels <= num_clusters:
        return torch.arange(channels)
    affinity = ((npmi(occurs) + 1) / 2).cpu().numpy()
    model = SpectralClustering(num_clusters, affinity="precomputed", random_state=seed, n_init=10)
    # numpy's and scikit-learn's own threads are not those that `pin` sets, and decide the last bits as well.
    with threadpool_limits(1), warnings.catch_warnings():
        # A disconnected graph is a fine answer here: separate clusters.
        warnings.filterwarnings("ignore", message=".*not fully connected.*")
        try:
            labels = model.fit_predict(affinity)
        except (RuntimeError, ValueError, np.linalg.LinAlgError) as error:
            raise NumericalError(f"spectral clustering of {channels} channels failed: {error}") from None
    return torch.from_numpy(labels).long()


def assign_tokens(occurs: Bool[Tensor, "T C"], labels: Int[Tensor, " C"], num_clusters: int) -> Int[Tensor, " T"]:
    """The cluster that holds most of a token's important channels; -1 for a token that has none of them."""
    member = torch.nn.functional.one_hot(labels.to(occurs.device), num_clusters).float()
    overlap = occurs.float() @ member
    best = overlap.argmax(dim=1)
    return torch.where(overlap.amax(dim=1) > 0, best, torch.full_like(best, -1))
