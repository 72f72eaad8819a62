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

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import RouterInput
from qe_dist.methods.base import NO_COLUMNS, Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.affinity import (
    assign_tokens,
    cluster_channels,
    split_channels,
    top_channels,
)
from qe_dist.numerics.factors import adapter, rank_within, store_factor
from qe_dist.numerics.grid import round_activations
from qe_dist.numerics.lowrank import capped, gram_product, token_product
from qe_dist.numerics.refine import Refinement, refine
from qe_dist.numerics.routing import choose_experts, mean_residual, regress_errors
from qe_dist.numerics.stats import Needs

SHARED_WEIGHT = 0.05
"""Share of all tokens in the metric of one expert, so that few tokens cannot overfit it [INF]."""


@dataclass(frozen=True)
class QuantExperts:
    """Shared and routed low-rank experts; the budget's rank is split equally between the two (paper)."""

    k: int = 32
    """Important channels per token (paper; at most a 32nd of the layer's width)."""
    num_experts: int = 8
    """Routed experts (paper)."""
    extract: bool = False
    """Carry the experts' channels in 16 bits beside the quantized path."""
    exempt_columns: bool = True
    """Whether the shared expert carries the columns C_s instead of the codes (paper). Not to be asked of 4-bit factors,
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
    """Layer-wise training of routed experts and router; the paper's optional refinement has 16."""

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
        rank = self._rank(problem)
        if self.extract:
            error = error.index_fill(1, shared, 0.0)
        up, down = adapter(error, gram_product(gram), rank, bits)
        down = store_factor(down, bits).dense.to(down)  # what storing it loses is left to the routed experts
        left = error - up @ down
        common = Correction(shared_down=down, shared_up=up, shared_channels=shared if self.extract else None)

        owner, occurs = self._owners(problem.problem, shared)
        correction = self._with_experts(problem, common, left, owner, occurs)
        for _ in range(self.rounds):
            owner = choose_experts(stats.sample.router_x, correction.router)
            correction = self._with_experts(problem, common, left, owner, occurs)
        return self._refined(problem, correction, left) if self.refine_epochs else correction

    def _with_experts(
        self, problem: ErrorProblem, common: Correction, left: Tensor, owner: Tensor, occurs: Tensor
    ) -> Correction:
        """Routed experts for the tokens of each, and their router."""
        stats, gram = problem.stats, problem.stats.total_gram.to(left)
        rank, bits = self._rank(problem), problem.budget.factor_bits
        channels = None
        if common.shared_channels is not None:
            channels = self._own_channels(owner, occurs, common.shared_channels)
        ups, downs = [], []
        for e in range(self.num_experts):
            target = left if channels is None else left.index_fill(1, channels[e], 0.0)
            up, down = adapter(target, self._metric(stats, gram, owner == e), rank, bits)
            ups.append(up)
            downs.append(down)
        experts = replace(common, expert_up=torch.stack(ups), expert_down=torch.stack(downs), expert_channels=channels)
        return replace(experts, router=self._router(problem, experts, left).to(left))

    def _rank(self, problem: ErrorProblem) -> int:
        """Of each expert: half of a rank budget, or what a byte budget leaves after routers and columns."""
        if problem.budget.extra_bits is None:
            return max(1, problem.rank // 2)
        outputs, inputs = problem.stacked.shape
        experts, stats = self.num_experts, problem.stats
        bits = problem.budget.extra_bits * problem.problem.num_weights
        bits -= 16 * experts * stats.sample.router_x.shape[1]
        if self.extract:
            bits -= 16 * (1 + experts) * self._k(problem.problem) * outputs
        return max(1, rank_within(bits, outputs, inputs, problem.budget.factor_bits, copies=1 + experts))

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
        """As many channels as are shared: those most often important for the tokens of each expert. [E, k]"""
        counts = torch.stack([occurs[owner == e].sum(dim=0) for e in range(self.num_experts)])
        # Where an expert has too few, those that matter to any token fill up.
        counts = counts.double() + occurs.double().mean(dim=0) * 1e-3
        counts[:, shared] = -1.0  # never twice, even where no other channel was ever important
        return counts.argsort(dim=1, descending=True, stable=True)[:, : shared.numel()]

    def _metric(self, stats, gram: Tensor, mine: Tensor):
        """v -> G_e v: the expert's own tokens, and a little of all tokens."""
        x = stats.sample.x[mine].to(gram)
        if x.shape[0] == 0:
            return gram_product(gram)
        own = token_product(x)
        weight = SHARED_WEIGHT * x.shape[0] / max(1, stats.num_tokens)
        return lambda v: own(v) + weight * (gram @ v)

    def _router(self, problem: ErrorProblem, c: Correction, left: Tensor) -> Tensor:
        stats, group = problem.stats, problem.problem.group
        if self.router == "regression" or group.router_input != group.name or problem.problem.rotation:
            return regress_errors(stats.sample.router_x, expert_errors(problem, c))
        rows = [mean_residual(left - up @ down) for up, down in zip(c.expert_up, c.expert_down, strict=True)]
        router = torch.stack(rows)
        if problem.problem.input_scale is not None:  # the router reads x, the experts x / scale
            router = router / problem.problem.input_scale[0]
        return router

    def _refined(self, problem: ErrorProblem, c: Correction, left: Tensor) -> Correction:
        stats = problem.stats
        x = stats.sample.x.to(left)
        settings = Refinement(epochs=self.refine_epochs, seed=problem.problem.seed)
        expert_up, expert_down, router = refine(
            x,
            stats.sample.router_x.to(left),
            x @ left.T,
            (c.expert_up, c.expert_down, c.router),
            settings,
        )
        return replace(c, expert_up=expert_up, expert_down=expert_down, router=router)


def expert_errors(problem: ErrorProblem, c: Correction, tokens: int = 2048) -> Tensor:
    """[S, E]: size of the output error that each expert would leave each sampled token, everything counted.

    A token's output misses x (E - L_s - L_e)^T + (x - Qa(x)) Q(W)^T; an extracted channel of x misses nothing.
    """
    x = problem.stats.sample.x.to(c.expert_up)
    rounded = torch.cat(list(problem.problem.weights.values())) - problem.stacked
    left = problem.stacked - c.shared_up @ c.shared_down
    scheme = problem.problem.scheme
    errors = torch.empty(x.shape[0], c.expert_up.shape[0], device=x.device)
    for rows in torch.arange(x.shape[0], device=x.device).split(tokens):
        part, common = x[rows], None
        for e, (up, down) in enumerate(zip(c.expert_up, c.expert_down, strict=True)):
            if c.expert_channels is not None:
                gone = torch.cat([c.shared_channels, c.expert_channels[e]])
                part, common = x[rows].index_fill(1, gone, 0.0), None
            if common is None:
                common = part @ left.T + (part - round_activations(part, scheme)) @ rounded.T
            errors[rows, e] = (common - (part @ down.T) @ up.T).norm(dim=1).float()
    return errors


METHOD = QuantExperts
