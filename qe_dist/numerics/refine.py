"""Optional layer-wise refinement of routed experts and router (arXiv 2602.24059, section 7.2).

Only the routed experts and the router are trained, everything else stays. The paper gives AdamW, lr 1e-4,
cosine, 16 epochs of 100 iterations, and a regression plus a KL term; weights and targets are not published.
Here [INF]: top-1 routing as at run time, with the gradient of softmax(-R|x| / tau) (straight-through: a soft
mixture never sharpens, and near the optimum it found nothing);
regression = ||target - mixture||^2 relative to ||target||^2, KL = KL(softmax(-error_i / tau) || softmax(-R|x| / tau)).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Refinement:
    """Settings of `refine`: AdamW with a cosine schedule, `batch` tokens per iteration."""

    epochs: int = 16
    iterations: int = 100
    lr: float = 1e-4
    batch: int = 512
    kl_weight: float = 0.1
    seed: int = 0


def refine(
    x: Float[Tensor, "T I"],
    router_x: Float[Tensor, "T H"],
    target: Float[Tensor, "T O"],
    start: tuple[Float[Tensor, "E O R"], Float[Tensor, "E R I"], Float[Tensor, "E H"]],
    settings: Refinement,
) -> tuple[Float[Tensor, "E O R"], Float[Tensor, "E R I"], Float[Tensor, "E H"]]:
    """Experts and router after training; `target` is what the routed experts should output.

    Parameters are trained relative to their own size, so one learning rate serves all layers. The start is
    returned when training does not lower the top-1 error on these tokens.
    """
    sizes = [p.square().mean().sqrt().clamp_min(1e-12) for p in start]
    params = [(p / s).detach().requires_grad_() for p, s in zip(start, sizes, strict=True)]
    optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=0.0)
    total = settings.epochs * settings.iterations
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    draw = torch.Generator().manual_seed(settings.seed)
    scale = target.square().mean().clamp_min(1e-30)
    with torch.enable_grad():
        for _ in range(total):
            rows = torch.randint(x.shape[0], (min(settings.batch, x.shape[0]),), generator=draw)
            up, down, router = (p * s for p, s in zip(params, sizes, strict=True))
            outputs = _outputs(x[rows], up, down)
            errors = (target[rows, None] - outputs).square().mean(-1)
            score = router_x[rows].abs() @ router.T
            tau = score.detach().std(dim=1, correction=0).mean().clamp_min(1e-12)
            mix = torch.softmax(-score / tau, dim=1)
            chosen = F.one_hot(mix.argmax(dim=1), mix.shape[1]) + mix - mix.detach()
            mixed = (chosen[..., None] * outputs).sum(1)
            regression = (target[rows] - mixed).square().mean() / scale
            wanted = torch.softmax(-errors.detach() / errors.detach().std(correction=0).clamp_min(1e-30), dim=1)
            kl = F.kl_div(mix.clamp_min(1e-9).log(), wanted, reduction="batchmean")
            optimizer.zero_grad()
            (regression + settings.kl_weight * kl).backward()
            optimizer.step()
            schedule.step()
    up, down, router = ((p * s).detach() for p, s in zip(params, sizes, strict=True))
    end = up, down, router
    return end if _top1_error(x, router_x, target, end) < _top1_error(x, router_x, target, start) else start


def _outputs(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What every expert adds for every token. [T, E, O]"""
    return torch.einsum("ter,eor->teo", torch.einsum("ti,eri->ter", x, down), up)


def _top1_error(x: Tensor, router_x: Tensor, target: Tensor, parts: tuple[Tensor, ...]) -> float:
    up, down, router = parts
    expert = (router_x.abs() @ router.T).argmin(dim=1)
    error = 0.0
    for e in range(up.shape[0]):
        rows = expert == e
        error += float((target[rows] - (x[rows] @ down[e].T) @ up[e].T).square().sum())
    return error
