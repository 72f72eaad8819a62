"""The prologue against a float64 reference written here, under the interpreter or on a GPU."""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from qe_kernels.down import Down, DownConfig, Factor, down, down_config, down_reference
from qe_kernels.split_k import Workspace
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = DownConfig(rows=16, tokens=32, columns=32, split_k=2, warps=4, stages=2)
ROUNDING = {
    torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7,
    torch.float16: 2**-11,
    torch.float32: 0,
    torch.float64: 0,
}
"""The interpreter cuts bf16 off."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan(), "torch fills no uninitialised memory"
    yield
    torch.use_deterministic_algorithms(False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(DEVICE)


def factor(seed: int, storage: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Factor:
    """16: plain values; 8 and 4: random codes, the lowest and the highest too, with a scale per row."""
    if storage == "16":
        return normal(seed, *shape, dtype=dtype), None
    scale = normal(seed + 1, *shape[:-1]).abs()
    if storage == "8":
        codes = torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator(seed), dtype=torch.uint8)
    return codes.to(DEVICE), scale


def dense64(stored: Factor) -> Tensor:
    """Column by column, as the format's text says."""
    values, scale = stored
    if values.dtype == torch.uint8:
        matrix = torch.empty(*values.shape[:-1], 2 * values.shape[-1], dtype=torch.float64, device=values.device)
        for byte in range(values.shape[-1]):
            matrix[..., 2 * byte] = values[..., byte].double() % 16 - 8
            matrix[..., 2 * byte + 1] = values[..., byte].double() // 16 - 8
    else:
        matrix = values.double()
    return matrix if scale is None else matrix * scale.double().unsqueeze(-1)


def assert_projects(z: Tensor, x: Tensor, matrix: Tensor) -> None:
    """z = x matrix^T up to one rounding of z and a sum in float32 (float64 where x is)."""
    exact = x.double() @ matrix.T
    summed = 1e-14 if x.dtype == torch.float64 else 1e-6
    bound = ROUNDING[z.dtype] * exact.abs() + summed * (x.double().abs() @ matrix.abs().T) + summed / 10
    assert z.dtype == x.dtype
    assert ((z.double() - exact).abs() <= bound).all()


def run(x: Tensor, config: DownConfig = CONFIG, **parts: object) -> Down:
    workspace = Workspace.allocate(1 << 20, 1 << 10, DEVICE)
    result = down(x, **parts, config=config, workspace=workspace)
    assert not workspace.counters.any(), "the next launch needs counters at zero"
    return result


TOKENS = st.one_of(st.integers(0, 40), st.integers(0, 300))
STORAGES = st.sampled_from(["16", "8", "4"])
CONFIGS = st.builds(
    DownConfig,
    rows=st.sampled_from([16, 64]),
    tokens=st.sampled_from([16, 64]),
    columns=st.sampled_from([32, 64]),
    split_k=st.integers(1, 4),
    warps=st.just(4),
    stages=st.just(3),
)


@settings(max_examples=18)
@given(
    tokens=TOKENS,
    columns=st.integers(1, 150),
    rank=st.integers(1, 40),
    storage=STORAGES,
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    config=CONFIGS,
)
def test_the_shared_factor_projects(
    tokens: int, columns: int, rank: int, storage: str, dtype: torch.dtype, config: DownConfig
) -> None:
    columns += columns % 2 if storage == "4" else 0
    x, shared = normal(0, tokens, columns, dtype=dtype), factor(1, storage, rank, columns, dtype=dtype)
    result = run(x, config, shared=shared)
    assert_projects(result.shared_z, x, dense64(shared))
    assert result.expert_z is None
    assert result.expert is None


@settings(max_examples=18)
@given(
    tokens=TOKENS,
    columns=st.integers(1, 50).map(lambda n: 2 * n),
    experts=st.integers(0, 16),
    rank=st.integers(1, 20),
    storage=STORAGES,
    config=CONFIGS,
)
def test_all_experts_project_where_no_choice_is_known(
    tokens: int, columns: int, experts: int, rank: int, storage: str, config: DownConfig
) -> None:
    x, stored = normal(0, tokens, columns), factor(1, storage, experts, rank, columns)
    result = run(x, config, experts=stored)
    assert result.expert_z.shape == (tokens, experts, rank)
    for expert, matrix in enumerate(dense64(stored)):
        assert_projects(result.expert_z[:, expert], x, matrix)


@pytest.mark.parametrize("choice", ["mixed", "all on one", "none"])
@pytest.mark.parametrize("storage", ["16", "8", "4"])
def test_known_experts_project_their_tokens(storage: str, choice: str) -> None:
    """Experts 1 and 5 of 8 have no tokens: their factors may hold anything."""
    tokens, columns, experts, rank = 70, 90, 8, 12
    x, (values, scale) = normal(0, tokens, columns), factor(1, storage, experts, rank, columns)
    present = {"mixed": [-1, 0, 2, 3, 4, 6, 7], "all on one": [3], "none": [-1]}[choice]
    pick = torch.randint(0, len(present), (tokens,), generator=generator(2))
    expert = torch.tensor(present, dtype=torch.int32)[pick].to(DEVICE)
    matrices = dense64((values, scale))
    (values if scale is None else scale)[[1, 5]] = torch.nan
    z = run(x, experts=(values, scale), expert=expert).expert_z
    for index in set(present) - {-1}:
        assert_projects(z[expert == index, index], x[expert == index], matrices[index])
    assert z[:, [1, 5]].isnan().all()


def test_a_tile_reads_only_the_experts_of_its_own_tokens() -> None:
    x, stored = normal(0, 64, 64), factor(1, "8", 4, 16, 64)
    expert = torch.tensor([1] * 32 + [2] * 32, dtype=torch.int32, device=DEVICE)
    written = ~run(x, replace(CONFIG, rows=64), experts=stored, expert=expert).expert_z.isnan().all(dim=2)
    assert written[:32].tolist() == [[False, True, False, False]] * 32
    assert written[32:].tolist() == [[False, False, True, False]] * 32


@settings(max_examples=12)
@given(
    tokens=TOKENS,
    columns=st.integers(1, 150),
    routers=st.integers(1, 3),
    experts=st.integers(1, 16),
    config=CONFIGS,
)
def test_routers_choose_the_lowest_score_and_the_lower_index(
    tokens: int, columns: int, routers: int, experts: int, config: DownConfig
) -> None:
    """Small integers: the sums are exact, and many are equal."""
    router = torch.randint(-1, 2, (routers, experts, columns), generator=generator(1)).to(torch.bfloat16).to(DEVICE)
    x = torch.randint(-2, 3, (tokens, columns), generator=generator(2)).to(torch.bfloat16).to(DEVICE)
    workspace = Workspace.allocate(1 << 20, 1 << 10, DEVICE)
    chosen = down(x, router=router, router_x=x, config=config, workspace=workspace).expert
    assert chosen.dtype == torch.int32
    assert chosen.shape == (routers, tokens)
    scores = torch.einsum("teh,mh->tme", router.double(), x.double().abs())
    for own, row in zip(chosen.flatten().tolist(), scores.flatten(0, 1).tolist(), strict=True):
        assert own == row.index(min(row))


def test_scores_that_are_nan_are_never_chosen() -> None:
    router = normal(0, 1, 4, 40).abs()
    router[0, 0, 3] = torch.nan
    router[0, 2] = -1.0
    x = normal(1, 20, 40)
    x[7, 5] = torch.nan
    chosen = run(x, router=router, router_x=x).expert[0].tolist()
    assert chosen == [-1 if token == 7 else 2 for token in range(20)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_score_without_bound_is_chosen_where_all_others_are_nan() -> None:
    router = torch.tensor([[[torch.nan], [torch.inf]]], dtype=torch.bfloat16, device=DEVICE)
    x = torch.ones(3, 1, dtype=torch.bfloat16, device=DEVICE)
    assert run(x, router=router, router_x=x).expert.tolist() == [[1, 1, 1]]
    assert down_reference(x, router=router, router_x=x).expert.tolist() == [[1, 1, 1]]


@settings(max_examples=6)
@given(tokens=st.integers(1, 80), storage=STORAGES, config=CONFIGS)
def test_one_launch_does_it_all(tokens: int, storage: str, config: DownConfig) -> None:
    """Another width for the routers, and rows of x that lie apart, as in a part of a fused output."""
    x = normal(0, tokens, 200)[:, 50:150]
    router_x = normal(1, tokens, 300)[:, :70]
    parts = {"shared": factor(2, storage, 20, 100), "experts": factor(4, storage, 5, 16, 100)}
    router = torch.randint(-1, 2, (2, 5, 70), generator=generator(6)).to(torch.bfloat16).to(DEVICE)
    result = run(x, config, **parts, router=router, router_x=router_x)
    assert_projects(result.shared_z, x, dense64(parts["shared"]))
    assert_projects(result.expert_z.flatten(1), x, dense64(parts["experts"]).flatten(0, 1))
    scores = torch.einsum("teh,mh->tme", router.double(), router_x.double().abs())
    chosen = scores.gather(2, result.expert.long().unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(chosen, scores.amin(dim=-1), rtol=0, atol=1e-4)


def test_a_float16_model_may_have_bfloat16_factors() -> None:
    """Also factors too small for float16."""
    x, shared = normal(0, 20, 64, dtype=torch.float16), factor(1, "16", 10, 64)
    shared[0][0] *= 2.0**-40
    x[:, 0] = 2.0**15
    assert_projects(run(x, shared=shared).shared_z, x, dense64(shared))


@pytest.mark.parametrize("split_k", [1, 3, 7])
def test_every_run_gives_the_same_bits(split_k: int) -> None:
    """More splits than blocks of K as well: some programs then have nothing to add."""
    config = replace(CONFIG, split_k=split_k)
    x, shared = normal(0, 40, 130), factor(1, "4", 30, 130)
    first, second = (run(x, config, shared=shared).shared_z for _ in range(2))
    assert torch.equal(first, second)
    assert_projects(first, x, dense64(shared))


@pytest.mark.parametrize(
    ("name", "workspace"),
    [("partials", Workspace.allocate(100, 100, DEVICE)), ("counters", Workspace.allocate(100_000, 1, DEVICE))],
)
def test_a_workspace_that_is_too_small_is_refused(name: str, workspace: Workspace) -> None:
    with pytest.raises(ValueError, match=rf"workspace.{name}: expected room for at least \d+, found 1"):
        down(normal(0, 33, 64), shared=factor(1, "16", 33, 64), config=CONFIG, workspace=workspace)


def test_factors_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts: expected torch.int8 as shared, found torch.uint8"):
        run(normal(0, 3, 64), shared=factor(1, "8", 5, 64), experts=factor(2, "4", 2, 5, 64))


def test_without_splits_no_workspace_is_used() -> None:
    x, shared = normal(0, 33, 64), factor(1, "16", 33, 64)
    nothing = Workspace.allocate(0, 0, DEVICE)
    z = down(x, shared=shared, config=replace(CONFIG, split_k=1), workspace=nothing).shared_z
    assert_projects(z, x, dense64(shared))


@pytest.mark.parametrize("storage", ["16", "8", "4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_torch_reference_computes_the_same(storage: str, dtype: torch.dtype) -> None:
    x, shared, experts = normal(0, 9, 30, dtype=dtype), factor(1, storage, 6, 30), factor(3, storage, 4, 5, 30)
    router = normal(5, 2, 4, 30)
    result = down_reference(x, shared, experts, router, x)
    assert_projects(result.shared_z, x, dense64(shared))
    assert_projects(result.expert_z.flatten(1), x, dense64(experts).flatten(0, 1))
    scores = torch.einsum("teh,mh->tme", router.double(), x.double().abs())
    assert result.expert.tolist() == scores.argmin(dim=-1).tolist()


def test_few_tokens_split_k_and_many_do_not() -> None:
    processors, rows = 132, 384
    assert down_config(1, rows, 8192, processors).split_k == 16
    assert down_config(1, rows, 29696, processors).split_k == 32
    assert down_config(8192, rows, 8192, processors).split_k == 1
    assert down_config(1, rows, 64, processors).split_k == 1
