"""Quant Experts (arXiv 2602.24059): a shared low-rank expert, routed ones, and a router for every group.

Steps as in the paper; what it leaves open, and is inferred here, is marked [INF]:
 1. a channel of a token is important by |x_c| * mean|W_c|; C_s: most often important, C_r: the next ones;
 2. columns C_s are exempted from rounding; the shared expert is the best rank-r repair of W - Q(W);
 3. C_r is clustered by NPMI of co-occurrence; a token belongs to the cluster with most of its channels;
 4. a routed expert is the best repair of what is left, for the tokens of its cluster;
 5. the router, linear in |x|, predicts what each expert leaves unrepaired, without training.

With `extract` (docs/how/methods.md) the channels C_s, and those most often important for an expert's tokens,
leave the activation quantizer and are carried in 16 bits, so the grid of the token shrinks.

Beyond the paper: `rounds` repeats 4 and 5 for the tokens that the router sends to each expert, as k-means does; without
`exempt_columns` all columns are rounded, and all ranks are free for what rounding left; at 4 bits the up matrices are
refitted to the stored down matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import RouterInput
from qe_dist.methods.base import (
    NO_COLUMNS,
    Budget,
    Compensation,
    Correction,
    ErrorProblem,
    Experts,
    GroupProblem,
    LowRank,
)
from qe_dist.numerics.affinity import (
    assign_tokens,
    cluster_channels,
    split_channels,
    top_channels,
)
from qe_dist.numerics.factors import adapter, column_bits, pair_bits, rank_within, store_factor
from qe_dist.numerics.grid import round_activations
from qe_dist.numerics.lowrank import OVERSAMPLE, capped, gram_product, low_rank_floats, token_product
from qe_dist.numerics.refine import Refinement, refine
from qe_dist.numerics.routing import choose_experts, mean_residual, regress_errors
from qe_dist.numerics.stats import GroupStats, Needs

SHARED_WEIGHT = 0.05
"""Weight of all tokens in the metric of one expert, so that it cannot overfit few tokens [INF]."""


@dataclass(frozen=True)
class QuantExperts(Compensation):
    """Shared and routed low-rank experts; the budget's rank is split equally between the two (paper)."""

    k: int = 32
    """Number of important channels per token (the paper's; fewer on narrow layers, `numerics.lowrank.capped`)."""
    num_experts: int = 8
    """Number of routed experts (the paper's)."""
    extract: bool = False
    """Carry the experts' channels in 16 bits beside the quantized path."""
    exempt_columns: bool = True
    """Whether the shared expert carries the columns C_s instead of the codes (paper). Turn it off with 4-bit factors,
    which cannot hold whole columns."""
    rounds: int = 0
    """How often the experts are fitted anew for the tokens that the router sends to them. The paper: never."""
    router: Literal["regression", "mean_residual"] = "regression"
    """regression: least squares on the measured errors of the sample. mean_residual: mean|residual| of each
    input channel, as in the paper; only where the router reads the group's own input, not rotated at run time."""
    router_input: RouterInput = "sublayer"
    """What the routers of o and down read. sublayer: the input of their sublayer, which every tensor-parallel rank has
    in full. own: the tensor that they multiply, as in the paper; such a checkpoint runs on one rank only."""
    refine_epochs: int = 0
    """Epochs of layer-wise training of routed experts and router; the paper's optional refinement has 16."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.num_experts < 1 or self.refine_epochs < 0 or self.rounds < 0:
            raise ConfigError(
                "compensation.k and .num_experts must be at least 1, .refine_epochs and .rounds at least 0, "
                f"found {self.k}, {self.num_experts}, {self.refine_epochs}, {self.rounds}"
            )
        if self.router not in ("regression", "mean_residual"):
            raise ConfigError(f"compensation.router must be regression or mean_residual, found {self.router!r}")

        if self.router_input not in ("sublayer", "own"):
            raise ConfigError(f"compensation.router_input must be sublayer or own, found {self.router_input!r}")
        if self.extract and not self.exempt_columns:
            raise ConfigError("compensation.extract carries columns beside the codes; set exempt_columns = true")
        if self.extract and self.refine_epochs:
            raise ConfigError("compensation.refine_epochs trains low-rank experts only; set extract = false")

    def needs(self) -> Needs:
        return Needs(gram=True, top_channels=frozenset({self.k}))

    def _k(self, problem: GroupProblem) -> int:
        return capped(problem.group.in_features, self.k)

    def exempt(self, problem: GroupProblem) -> Tensor:
        return self._shared_channels(problem) if self.exempt_columns else NO_COLUMNS

    def _shared_channels(self, problem: GroupProblem) -> Tensor:
        return split_channels(problem.stats.frequency(self.k), self._k(problem), 0)[0]

    def fit(self, problem: ErrorProblem) -> Correction:
        stats, error, bits = problem.stats, problem.stacked, problem.budget.factor_bits
        gram = stats.total_gram.to(error.dtype)
        shared = self._shared_channels(problem.problem)
        rank = self._rank_of(problem)
        if self.extract:
            error = error.index_fill(1, shared, 0.0)
        up, down = adapter(error, gram_product(gram), rank, bits)
        down = store_factor(down, bits).dense.to(down)  # what storing it loses is left to the routed experts
        left = error - up @ down
        common = Correction(LowRank(up, down), extracted=shared if self.extract else None)

        owner, occurs = self._owners(problem.problem, shared)
        experts, router = self._experts(problem, common, left, owner, occurs)
        for _ in range(self.rounds):
            owner = choose_experts(stats.sample.router_x, router)
            experts, router = self._experts(problem, common, left, owner, occurs)
        if self.refine_epochs:
            experts, router = self._refined(problem, experts, router, left)
        return replace(common, experts=replace(experts, router=router))

    def _experts(
        self, problem: ErrorProblem, common: Correction, left: Tensor, owner: Tensor, occurs: Tensor
    ) -> tuple[Experts, Tensor]:
        """Routed experts, each fitted to the tokens that it owns, and their router [E, H]."""
        stats, gram = problem.stats, problem.stats.total_gram.to(left)
        rank, bits = self._rank_of(problem), problem.budget.factor_bits
        channels = None if common.extracted is None else self._own_channels(owner, occurs, common.extracted)
        ups, downs = [], []
        for e in range(self.num_experts):
            target = left if channels is None else left.index_fill(1, channels[e], 0.0)
            up, down = adapter(target, self._metric(stats, gram, owner == e), rank, bits)
            ups.append(up)
            downs.append(down)
        experts = Experts(torch.stack(ups), torch.stack(downs), channels=channels)
        return experts, self._router(problem, common, experts, left).to(left)

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        rank, copies = self._rank(outputs, width, router_width, budget), 1 + self.num_experts
        bits = pair_bits(rank, outputs, width, budget.factor_bits, copies) + 16 * self.num_experts * router_width
        if self.extract:
            bits += copies * column_bits(capped(width, self.k), outputs, 16)
        return bits // 8

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        rank = budget.rank_for(outputs, width)  # of an expert and the shared one together
        experts = self.num_experts * (rank + OVERSAMPLE) * (outputs + width)
        metrics = 2 * width * width + 3 * outputs * width + 9 * sample_tokens * (outputs + width)
        return low_rank_floats(outputs, width, rank) + metrics + experts

    def _rank(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        """The rank of each expert: half of a rank budget, or what a byte budget leaves after routers and columns."""
        if budget.extra_bits is None:
            return max(1, budget.rank_for(outputs, width) // 2)
        bits = budget.extra_bits * (outputs * width) - 16 * self.num_experts * router_width
        if self.extract:
            bits -= 16 * (1 + self.num_experts) * capped(width, self.k) * outputs
        return max(1, rank_within(bits, outputs, width, budget.factor_bits, copies=1 + self.num_experts))

    def _rank_of(self, problem: ErrorProblem) -> int:
        outputs, width = problem.stacked.shape
        return self._rank(outputs, width, problem.stats.sample.router_x.shape[1], problem.budget)

    def _owners(self, problem: GroupProblem, shared: Tensor) -> tuple[Tensor, Tensor]:
        """(expert of every sampled token or -1, its important channels beside the shared ones)."""
        stats, seed = problem.stats, problem.seed
        k = self._k(problem)
        _, routed = split_channels(stats.frequency(self.k), k, self.num_experts * k)
        occurs = top_channels(stats.sample.x.float(), stats.importance, k)
        seen = routed[occurs[:, routed].any(dim=0)]
        labels = self.clusters(occurs[:, seen], seed)
        owner = assign_tokens(occurs[:, seen], labels, self.num_experts)
        return owner, occurs.index_fill(1, shared, False)

    def clusters(self, occurs: Bool[Tensor, "T C"], seed: int) -> Int[Tensor, " C"]:
        """The expert of every routed channel. occurs: where a channel is important for a sampled token."""
        return cluster_channels(occurs, self.num_experts, seed)

    def _own_channels(self, owner: Tensor, occurs: Tensor, shared: Tensor) -> Tensor:
        """[E, k]: the channels that each expert extracts, as many as are shared: those most often important for it."""
        counts = torch.stack([occurs[owner == e].sum(dim=0) for e in range(self.num_experts)])
        # Where an expert has too few, those that matter to any token fill up.
        counts = counts.double() + occurs.double().mean(dim=0) * 1e-3
        counts[:, shared] = -1.0  # never twice, even where no other channel was ever important
        return counts.argsort(dim=1, descending=True, stable=True)[:, : shared.numel()]

    def _metric(self, stats: GroupStats, gram: Tensor, mine: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> G_e v: the expert's own tokens, and a little of all tokens."""
        x = stats.sample.x[mine].to(gram)
        if x.shape[0] == 0:
            return gram_product(gram)
        own = token_product(x)
        weight = SHARED_WEIGHT * x.shape[0] / max(1, stats.num_tokens)
        return lambda v: own(v) + weight * (gram @ v)

    def _router(self, problem: ErrorProblem, common: Correction, experts: Experts, left: Tensor) -> Tensor:
        stats, group = problem.stats, problem.problem.group
        if self.router == "regression" or group.router_input != group.name or problem.problem.rotation:
            return regress_errors(stats.sample.router_x, expert_errors(problem, replace(common, experts=experts)))
        rows = [mean_residual(left - up @ down) for up, down in zip(experts.up, experts.down, strict=True)]
        router = torch.stack(rows)
        if problem.problem.input_scale is not None:  # the router reads x, the experts x / scale
            router = router / problem.problem.input_scale[0]
        return router

    def _refined(self, problem: ErrorProblem, experts: Experts, router: Tensor, left: Tensor) -> tuple[Experts, Tensor]:
        """Experts and router after training on what is left for them."""
        stats = problem.stats
        x = stats.sample.x.to(left)
        settings = Refinement(epochs=self.refine_epochs, seed=problem.problem.seed)
        start = experts.up, experts.down, router
        up, down, router = refine(x, stats.sample.router_x.to(left), x @ left.T, start, settings)
        return Experts(up, down), router


def expert_errors(problem: ErrorProblem, c: Correction, tokens: int = 2048) -> Tensor:
    """[S, E]: size of the output error that each expert would leave each sampled token, everything counted.

    A token's output misses x (E - L_s - L_e)^T + (x - Qa(x)) Q(W)^T; an extracted channel of x misses nothing.
    """
    shared, experts = c.shared, c.experts
    if shared is None or experts is None:
        raise ValueError("the correction needs a shared expert and routed ones")
    x = problem.stats.sample.x.to(experts.up)
    rounded = torch.cat(list(problem.problem.weights.values())) - problem.stacked
    left = problem.stacked - shared.up @ shared.down
    scheme = problem.problem.scheme
    errors = torch.empty(x.shape[0], len(experts.up), device=x.device)
    for rows in torch.arange(x.shape[0], device=x.device).split(tokens):
        part, common = x[rows], None
        for e, (up, down) in enumerate(zip(experts.up, experts.down, strict=True)):
            if experts.channels is not None and c.extracted is not None:
                gone = torch.cat([c.extracted, experts.channels[e]])
                part, common = x[rows].index_fill(1, gone, 0.0), None
            if common is None:
                common = part @ left.T + (part - round_activations(part, scheme)) @ rounded.T
            errors[rows, e] = (common - (part @ down.T) @ up.T).norm(dim=1).float()
    return errors


METHOD = QuantExperts
