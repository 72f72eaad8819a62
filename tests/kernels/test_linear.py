"""The fused linear computes the formula, for every format, shape and routing, and always to the same bits."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qe_kernels.branches import Branch, pack_up
from qe_kernels.dense import dequantize, dequantize_reference
from qe_kernels.factors import padded_rank
from qe_kernels.layout import Order, Weight, pack_weight
from qe_kernels.linear import Config, linear, linear_reference
from qe_kernels.split_k import Workspace
from torch import Tensor

from qe_dist.numerics.packing import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
STORED = UNIT if DEVICE == "cuda" else UNIT | {torch.bfloat16: 2.0**-7}
"""Of the result. Triton's interpreter cuts float32 off where a GPU rounds it to bf16."""
FORMATS = ("bf16", "fp16", "int8", "pairs")


@dataclass(frozen=True)
class Problem:
    """Arguments of `linear`, and what it must return: float64, computed from the numbers before they were packed."""

    arguments: dict[str, Any]
    expected: Tensor
    bound: Tensor
    """Of the error, by what is rounded: scaled weights and factors to 16 bits, sums to float32, y to its dtype."""

    def run(self, config: Config, workspace: Workspace | None = None) -> Tensor:
        tiles = math.ceil(self.expected.shape[0] / config.BM) * math.ceil(self.expected.shape[1] / config.BN)
        workspace = workspace or Workspace.allocate(tiles * (config.split_k + 1) * config.BM * config.BN, tiles, DEVICE)
        workspace.partials.fill_(math.nan)
        with poisoned_outputs():
            y = linear(**self.arguments, config=config, workspace=workspace)
        assert not workspace.counters.any()
        return y.cpu()

    def assert_solved_by(self, y: Tensor) -> None:
        assert y.dtype == self.arguments["out_dtype"]
        assert y.shape == self.expected.shape
        excess = (y.double() - self.expected).abs() - self.bound
        assert (excess <= 0).all(), f"beyond the bound by up to {excess.max()}"  # not >: NaN must fail


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """What is allocated and not written shows as NaN."""
    empty = torch.empty
    with patch("torch.empty", lambda *args, **options: empty(*args, **options).fill_(math.nan)):
        yield


def make_problem(
    seed: int,
    tokens: int,
    outputs: int,
    inputs: int,
    *,
    bits: int = 4,
    group_size: int | None = None,
    order: Order = Order.NATURAL,
    int8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    act_codes: bool = False,
    shared: tuple[int, str] | None = None,
    shared_columns: int = 0,
    experts: tuple[int, int, str] | None = None,
    expert_columns: tuple[int, int] | None = None,
    salient: tuple[int, str] | None = None,
    routing: str = "any",
    bias: bool = False,
) -> Problem:
    """Branches: (rank, format of the factor); of experts (experts, rank, format)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    weight, w = random_weight(draw, outputs, inputs, bits, group_size, order, int8)
    token_scale = None
    if int8 or act_codes:
        base = torch.randint(-127, 128, (tokens, inputs), generator=draw).to(torch.int8 if int8 else dtype)
        token_scale = 0.01 + torch.rand(tokens, generator=draw)
    else:
        base = normal(tokens, inputs)
    x = base.double() * (1 if token_scale is None else token_scale.double()[:, None])
    expected, rounded = x @ w.T, x.abs() @ w.T.abs()

    branches, expert = [], None
    for spec in (shared, (shared_columns, "plain") if shared_columns else None, salient):
        if spec is not None:
            z, (factor, scale, up) = normal(tokens, spec[0]), random_factor(draw, spec[1], dtype, outputs, spec[0])
            branches.append(branch(z, factor, scale, order))
            expected, rounded = expected + z.double() @ up.T, rounded + z.double().abs() @ up.T.abs()
    if experts or expert_columns:
        expert = random_experts(draw, routing, tokens, (experts or expert_columns)[0])
    for spec in (experts, (*expert_columns, "plain") if expert_columns else None):
        if spec is not None:
            count, rank, form = spec
            factor, scale, up = random_factor(draw, form, dtype, count, outputs, rank)
            compact = form == "plain"
            z = normal(tokens, rank) if compact else normal(tokens, count, rank)
            for token in range(tokens):
                chosen = int(expert[token])
                if chosen >= 0:
                    own = (z[token] if compact else z[token, chosen]).double()
                    expected[token] += up[chosen] @ own
                    rounded[token] += up[chosen].abs() @ own.abs()
            others = expert[:, None] != torch.arange(count)
            branches.append(branch(poison(z, expert < 0 if compact else others), factor, scale, order))
    offset = normal(outputs) if bias else None
    if offset is not None:
        expected = expected + offset.double()
    arguments = {
        "base": base,
        "token_scale": token_scale,
        "weight": weight,
        "branches": branches,
        "expert": expert,
        "bias": offset,
        "out_dtype": dtype,
    }
    bound = UNIT[dtype] * rounded + STORED[dtype] * expected.abs() + 2.0**-20 * rounded + 1e-6
    return Problem(on_device(arguments), expected, bound)


def branch(z: Tensor, values: Tensor, scale: Tensor | None, order: Order) -> Branch:
    """With ranks as at load; the columns of zeros meet numbers that are not zero."""
    z = torch.cat((z, torch.ones(*z.shape[:-1], padded_rank(z.shape[-1]) - z.shape[-1], dtype=z.dtype)), dim=-1)
    return Branch(z, pack_up((values, scale), order), len(values) if values.dim() == 3 else None)


def on_device(value: Any) -> Any:
    """The same with all tensors where the kernels run."""
    match value:
        case Tensor():
            return value.to(DEVICE)
        case Branch() | Weight():
            return replace(value, **on_device(vars(value)))
        case dict():
            return {name: on_device(part) for name, part in value.items()}
        case list() | tuple():
            return type(value)(on_device(part) for part in value)
    return value


def random_weight(
    draw: torch.Generator, outputs: int, inputs: int, bits: int, group_size: int | None, order: Order, int8: bool
) -> tuple[Weight, Tensor]:
    """With its dense float64 form. Scales have both signs, as those of tuned weights."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), generator=draw).to(torch.int8)
    groups = inputs // group_size if group_size else 1
    scale = ((2 * torch.rand(outputs, groups, generator=draw) - 1) / 2**bits).to(torch.bfloat16)
    weight = pack_weight(pack(codes, bits), bits, scale, inputs, order, int8, group_size)
    return weight, codes.double() * scale.double().repeat_interleave(inputs // groups, dim=1)


def random_factor(
    draw: torch.Generator, form: str, dtype: torch.dtype, *shape: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(values, scale, dense float64) as a checkpoint stores it; `plain`: in the activations' dtype."""
    if form in ("bf16", "fp16", "plain"):
        stored = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form, dtype)
        values = torch.randn(*shape, generator=draw).to(stored)
        return values, None, values.double()
    top = 127 if form == "int8" else 7
    codes = torch.randint(-top, top + 1, shape, generator=draw)
    scale = ((0.5 + torch.rand(shape[:-1], generator=draw)) / top).to(torch.bfloat16)
    dense = codes.double() * scale.double()[..., None]
    if form == "int8":
        return codes.to(torch.int8), scale, dense
    return ((codes[..., 0::2] + 8) | (codes[..., 1::2] + 8) << 4).to(torch.uint8), scale, dense


def random_experts(draw: torch.Generator, routing: str, tokens: int, experts: int) -> Tensor:
    """int32 [tokens]; any: all occur, and -1; half: every second never; one: the last only; none: -1 only."""
    if routing == "none" or not experts:
        return torch.full((tokens,), -1, dtype=torch.int32)
    if routing == "one":
        return torch.full((tokens,), experts - 1, dtype=torch.int32)
    chosen = torch.randint(-1, experts, (tokens,), generator=draw, dtype=torch.int32)
    return torch.where(chosen >= 0, chosen // 2 * 2, chosen) if routing == "half" else chosen


def poison(z: Tensor, where: Tensor) -> Tensor:
    return z.masked_fill(where[..., None], math.nan)


def smallest_step(bits: int) -> int:
    """BK that the WGMMA order allows, see `unpack.load_weight`."""
    return 128 // (bits & -bits)


@st.composite
def problems(draw: Callable[..., Any]) -> tuple[Problem, Config]:
    bits, int8 = draw(st.integers(2, 8)), draw(st.booleans())
    block_k = draw(st.sampled_from([size for size in (32, 64, 128, 256) if size >= smallest_step(bits)]))
    group_size = draw(st.sampled_from((None, 32, 64, 128)))
    if int8 and group_size is not None and group_size % block_k:
        group_size = None
    inputs = draw(st.integers(1, 320)) if group_size is None else group_size * draw(st.integers(1, 320 // group_size))
    tokens = draw(st.one_of(st.integers(1, 20), st.integers(1, 300)))
    block_m = 16 if tokens <= 32 else draw(st.sampled_from((64, 128)))

    def factor(*shape: st.SearchStrategy[int]) -> Any:
        form = draw(st.sampled_from(FORMATS))
        *experts, rank = (draw(size) for size in shape)
        return (*experts, rank + rank % 2 if form == "pairs" else rank, form)

    def maybe(make: Callable[[], Any]) -> Any:
        return make() if draw(st.booleans()) else None

    count = draw(st.integers(1, 16))
    problem = make_problem(
        draw(st.integers(0, 2**31)),
        tokens,
        draw(st.integers(1, 150)),
        inputs,
        bits=bits,
        group_size=group_size,
        order=draw(st.sampled_from(Order)),
        int8=int8,
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        act_codes=draw(st.booleans()),
        shared=maybe(lambda: factor(st.integers(1, 100))),
        shared_columns=draw(st.sampled_from((0, 5, 70))),
        experts=maybe(lambda: factor(st.just(count), st.integers(1, 40))),
        expert_columns=maybe(lambda: (count, draw(st.integers(1, 20)))),
        salient=maybe(lambda: factor(st.integers(1, 20))),
        routing=draw(st.sampled_from(("any", "half", "one", "none"))),
        bias=draw(st.booleans()),
    )
    config = Config(
        BN=draw(st.sampled_from((64, 128))),
        BM=block_m,
        BK=block_k,
        split_k=draw(st.integers(1, 5)),
        group_m=draw(st.integers(1, 3)),
        scale_weights=not int8 and draw(st.booleans()),
    )
    return problem, config


@given(problems())
@settings(max_examples=25)
def test_the_kernel_computes_the_formula(drawn: tuple[Problem, Config]) -> None:
    problem, config = drawn
    problem.assert_solved_by(problem.run(config))


@given(problems())
def test_the_reference_computes_the_formula(drawn: tuple[Problem, Config]) -> None:
    problem, _ = drawn
    problem.assert_solved_by(linear_reference(**problem.arguments).cpu())
    exact = linear_reference(**problem.arguments | {"out_dtype": torch.float64}, compute=torch.float64)
    torch.testing.assert_close(exact.cpu(), problem.expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("int8", [False, True], ids=["a16", "a8"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits(bits: int, int8: bool, order: Order) -> None:
    problem = make_problem(bits, 3, 70, 256, bits=bits, group_size=128, order=order, int8=int8)
    problem.assert_solved_by(problem.run(Config(64, 16, 128, split_k=2)))


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(
    ("group_size", "block_k", "scale_weights"),
    [(128, 128, False), (128, 32, False), (256, 128, False), (32, 128, False), (128, 128, True), (256, 64, True)],
)
def test_each_step_takes_its_own_scales(group_size: int, block_k: int, scale_weights: bool, split_k: int) -> None:
    problem = make_problem(0, 5, 70, 768, group_size=group_size)
    problem.assert_solved_by(problem.run(Config(64, 16, block_k, split_k=split_k, scale_weights=scale_weights)))


def test_equal_inputs_give_equal_bits() -> None:
    """Also where the workspace holds what the run before left."""
    problem = make_problem(
        0, 20, 130, 512, group_size=128, shared=(70, "pairs"), experts=(4, 16, "int8"), expert_columns=(4, 8), bias=True
    )
    config = Config(64, 16, 128, split_k=3)
    workspace = Workspace.allocate(6 * 4 * 64 * 16, 6, DEVICE)
    assert torch.equal(problem.run(config, workspace), problem.run(config, workspace))


def test_experts_that_no_token_of_the_tile_has_are_not_read() -> None:
    problem = make_problem(0, 5, 64, 128, experts=(6, 16, "fp16"), expert_columns=(6, 8), routing="half")
    for of in problem.arguments["branches"]:
        of.up[:, : 6 * of.rank].view(64, 6, of.rank)[:, 1::2] = math.nan
    problem.assert_solved_by(problem.run(Config(64, 16, 128)))


def test_views_of_larger_tensors_are_read_by_their_strides() -> None:
    problem = make_problem(0, 5, 70, 128, shared=(24, "bf16"), experts=(3, 16, "bf16"), dtype=torch.float16)
    wide = torch.cat(
        (problem.arguments["base"], torch.full((5, 16), math.nan, dtype=torch.float16, device=DEVICE)), dim=1
    )
    problem.arguments["base"] = wide[:, :128]
    problem.assert_solved_by(problem.run(Config(64, 16, 128)))


def test_no_tokens_give_no_rows() -> None:
    problem = make_problem(0, 0, 70, 128, shared=(8, "bf16"), experts=(3, 8, "bf16"))
    assert problem.run(Config(64, 16, 128)).shape == (0, 70)


@pytest.mark.parametrize("group_size", [None, 32, 96, 128, 384])
@pytest.mark.parametrize(("order", "int8"), [(Order.NATURAL, False), (Order.WGMMA, False), (Order.WGMMA, True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_equals_its_reference(bits: int, order: Order, int8: bool, group_size: int | None) -> None:
    """In fp16, for the interpreter rounds to bf16 by cutting off."""
    weight, dense = random_weight(torch.Generator().manual_seed(0), 70, 384, bits, group_size, order, int8)
    weight = on_device(weight)
    with poisoned_outputs():
        found = dequantize(weight, torch.float16)
    assert torch.equal(found.cpu(), dense.to(torch.float16))
    assert torch.equal(found, dequantize_reference(weight, torch.float16))


@pytest.mark.parametrize("columns", [1, 40, 129])
def test_dequantize_of_odd_shapes(columns: int) -> None:
    weight, dense = random_weight(torch.Generator().manual_seed(0), 65, columns, 3, None, Order.WGMMA, False)
    with poisoned_outputs():
        assert torch.equal(dequantize(on_device(weight), torch.float16).cpu(), dense.to(torch.float16))
