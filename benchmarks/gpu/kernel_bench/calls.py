"""The calls that bench_kernels.py measures, and what each must at least read, write and multiply."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from qe_kernels import Branch, Weight, ops
from qe_kernels.branches import Up
from qe_kernels.factors import Factor
from qe_kernels.linear import linear_reference
from torch import Tensor

from kernel_bench.cases import Problem, some_rows
from kernel_bench.timing import Rates

Prepared = tuple[Tensor, Tensor | None, list[Branch], Tensor | None]
"""Base, token scale, branches and experts: what a linear is called with beside its weight."""


def prepare(problem: Problem, x: Tensor) -> Prepared:
    """Rounding, down projections, routing."""
    f = problem.format
    made = ops.quantize(x, bits=f.act_bits, outliers=f.outliers, int8=f.int8)
    if problem.shared_down is None and problem.expert_down is None:
        return made.base, made.token_scale, [], None
    z = ops.down(x, problem.shared_down, problem.expert_down, problem.router, None if problem.router is None else x)
    expert = None if z.expert is None else z.expert[0]
    return made.base, made.token_scale, problem.branches(z.shared_z, z.expert_z), expert


def linear(problem: Problem, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    base, token_scale, branches, expert = prepared
    return ops.linear(base, token_scale, problem.weight, branches, expert, problem.bias, out_dtype=dtype)


def some_outputs(problem: Problem, prepared: Prepared) -> tuple[list[int], Tensor]:
    """Which outputs a few tiles hold, and their exact values, float64 [M, outputs]."""
    base, token_scale, branches, expert = prepared
    rows, part = some_rows(problem)
    ups = [up for up in (part.shared_up, part.expert_up) if up is not None]
    branches = [replace(branch, up=up) for branch, up in zip(branches, ups, strict=True)]
    exact = linear_reference(
        base, token_scale, part.weight, branches, expert, part.bias, out_dtype=torch.float64, compute=torch.float64
    )
    return rows, exact


def whole(problem: Problem, x: Tensor) -> Tensor:
    """All that a quantized linear launches."""
    return linear(problem, prepare(problem, x), x.dtype)


def unfused(problem: Problem, x: Tensor) -> Tensor:
    """`whole` with the branches as torch products; their factors are of 16 bits."""
    y = whole(replace(problem, shared_down=None, shared_up=None, expert_down=None, expert_up=None, router=None), x)
    if problem.shared_down is not None:
        rank = len(problem.shared_down[0])
        y.addmm_(x @ problem.shared_down[0].T, problem.shared_up[:, :rank].T)
    if problem.expert_down is not None:
        experts, rank, columns = problem.expert_down[0].shape
        expert = (x.abs() @ problem.router[0].T.to(x.dtype)).argmin(dim=1)
        own = expert[:, None] == torch.arange(experts, device=x.device)
        z = (x @ problem.expert_down[0].view(-1, columns).T).unflatten(1, (experts, rank)) * own[..., None]
        y.addmm_(z.flatten(1), problem.expert_up[:, : experts * rank].T)
    return y


@dataclass(frozen=True)
class Work:
    """What a call must at least read and write, and multiply."""

    bytes: float
    flop: float
    flop8: float = 0.0
    """Those of `flop` that the int8 tensor cores do."""

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        products = (self.flop - self.flop8) / rates.flop16 + self.flop8 / rates.flop8
        return max(self.bytes / rates.bytes, products)


def work_of_torch(outputs: int, inputs: int, tokens: int) -> Work:
    """A product with weights of 16 bits."""
    return Work(2.0 * (outputs * inputs + tokens * (inputs + outputs)), 2.0 * tokens * outputs * inputs)


def work_of_linear(problem: Problem, prepared: Prepared, chosen: int) -> Work:
    """chosen: how many experts the tokens have; the others are not read."""
    weight, (base, *_) = problem.weight, prepared
    tokens = len(base)
    ranks = _ranks(problem)
    shared_up, _, expert_up, _ = _factors(problem, chosen)
    read = base.nbytes + 2.0 * tokens * ranks + shared_up + expert_up
    main = 2.0 * tokens * weight.rows * weight.columns
    return Work(
        _stored(problem) + read + 2.0 * tokens * weight.rows,
        main + 2.0 * tokens * weight.rows * ranks,
        main if weight.int8 else 0.0,
    )


def work_of_whole(problem: Problem, tokens: int, chosen: int) -> Work:
    weight = problem.weight
    rows, columns = weight.rows, weight.columns
    ranks = _ranks(problem)
    routed = 0 if problem.router is None else problem.router.shape[1]
    router = 0 if problem.router is None else problem.router.nbytes
    main = 2.0 * tokens * rows * columns
    return Work(
        _stored(problem) + sum(_factors(problem, chosen)) + router + 2.0 * tokens * (rows + columns),
        main + 2.0 * tokens * (ranks * (rows + columns) + routed * columns),
        main if weight.int8 else 0.0,
    )


def _stored(problem: Problem) -> float:
    return float(sum(tensor.nbytes for tensor in (*problem.weight.planes, problem.weight.scale)))


def _factors(problem: Problem, chosen: int) -> Iterator[float]:
    """Bytes of every B, and of every A."""
    experts = 1 if problem.expert_down is None else len(problem.expert_down[0])
    for factor, part in (
        (problem.shared_up, 1.0),
        (problem.shared_down, 1.0),
        (problem.expert_up, chosen / experts),
        (problem.expert_down, chosen / experts),
    ):
        yield 0.0 if factor is None else part * _size(factor)


def _size(factor: Up | Factor) -> float:
    if isinstance(factor, Tensor):
        return float(factor.nbytes)
    tensors = (*factor.planes, factor.scale) if isinstance(factor, Weight) else factor
    return float(sum(tensor.nbytes for tensor in tensors if tensor is not None))


def _ranks(problem: Problem) -> int:
    """Of the branches that a token uses."""
    return sum(f[0].shape[-2] for f in (problem.shared_down, problem.expert_down) if f is not None)
