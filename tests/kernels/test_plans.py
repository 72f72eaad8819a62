"""Plans compile all that they will ever need at their first call, and check only what would read wrong memory."""

from collections.abc import Callable

import pytest
import torch
from qe_kernels import Branch, pack_up, plans
from qe_kernels.dispatch import BUCKETS, Device, bucket_config, place_of
from qe_kernels.launch import Launch, compile_all
from qe_kernels.layout import order_for
from qe_kernels.linear import linear_reference
from qe_kernels.plans import DownPlan, LinearPlan, QuantizePlan
from qe_kernels.quantize_reference import quantize_reference
from torch import Tensor

from tests.gate import in_gate
from tests.kernels import served
from tests.kernels.test_ops import K, M, N, X, codes, make_weight, normal

GPU = Device("interpreter", (8, 0), processors=2)


SERVED = [name + by for name in served.groups() for by in ("", " by ops")]
GATE = ("qe-w4a16g128 by ops", "experts-w4a8")


@pytest.fixture(scope="module")
def needed(request: pytest.FixtureRequest) -> dict[str, dict[str, list[str]]]:
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return served.measured([item.callspec.params["group"] for item in items if "group" in item.callspec.params])


@pytest.mark.parametrize("group", in_gate(GATE, SERVED))
def test_200_numbers_of_tokens_need_no_kernel_that_the_first_call_did_not(needed: dict, group: str) -> None:
    assert len(served.TOKENS) == 200
    found = needed[group]
    assert found["later"] == []
    assert len(found["first"]) <= 16


@pytest.mark.nightly
def test_variants_by_the_number_of_tokens_would_be_seen() -> None:
    assert all(found["later"] for found in served.measured(SERVED[::2], specialized=True).values())


def test_every_number_of_tokens_has_a_place() -> None:
    """Behind the buckets, where K is not split: a workspace has room for so many tiles only."""
    assert [place_of(tokens) for tokens in (1, 2, 16, 17, 4096, 4097, 10**6)] == [0, 1, 1, 2, 9, 10, 10]
    assert bucket_config(4097, 384, 8192, 132).split_k == 1
    assert all(config.split_k.bit_count() == 1 for config in (bucket_config(b, 384, 8192, 132) for b in BUCKETS))


@pytest.fixture
def linear_plan() -> tuple[LinearPlan, Tensor]:
    weight, z = make_weight(4, False, 128), normal(1, M, 64)
    up = pack_up((codes(13, N, 20, dtype=torch.uint8), normal(14, N).abs() / 100), order_for(GPU.capability))
    return LinearPlan(GPU, weight, [Branch(z, up)], torch.bfloat16), z


def test_a_linear_computes_the_formula_for_any_number_of_tokens(linear_plan: tuple[LinearPlan, Tensor]) -> None:
    plan, z = linear_plan
    for tokens in (0, 1, 2, M):
        y = plan(X[:tokens], None, [z[:tokens]], None, None)
        exact = linear_reference(
            X[:tokens], None, plan.weight, [Branch(z[:tokens], plan.branches[0].up)],
            out_dtype=torch.float64, compute=torch.float64,
        )  # fmt: skip
        assert y.shape == (tokens, N)
        assert ((y.double() - exact).abs() <= 2.0**-6 * (exact.abs() + exact.square().mean().sqrt())).all()


def test_from_1025_tokens_on_weights_are_dequantized_once(
    linear_plan: tuple[LinearPlan, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = linear_plan
    monkeypatch.setattr(plans, "linear_on_dense_weight", lambda *given, out_dtype: len(given[0]))
    assert plan(normal(0, 1025, K), None, [normal(1, 1025, 64)], None, None) == 1025
    assert isinstance(plan(normal(0, 65, K), None, [normal(1, 65, 64)], None, None), Tensor)


def unaligned(tokens: int, width: int) -> Tensor:
    return torch.zeros(tokens * width + 1, dtype=torch.bfloat16)[1:].view(tokens, width)


@pytest.mark.parametrize(
    "plan",
    [QuantizePlan(K, bits=8, int8=True), DownPlan(GPU, K, (normal(0, 32, K), None), None)],
    ids=["quantize", "down"],
)
def test_inputs_of_another_type_than_the_first_are_refused(plan: Callable[[Tensor], object]) -> None:
    x = normal(1, 4, K)
    plan(x)
    other = torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(ValueError, match=r"x: expected .* which its kernels were compiled for, found"):
        plan(x.to(other))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: QuantizePlan(K, bits=8, int8=True)(x), "x"),
        (lambda x: DownPlan(GPU, K, (normal(0, 32, K), None), None)(x), "x"),
        (lambda x: LinearPlan(GPU, make_weight(4, False, 128), [], torch.bfloat16)(x, None, [], None, None), "base"),
    ],
)
def test_memory_that_is_not_aligned_is_refused(call: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected memory aligned to 16 bytes"):
        call(unaligned(M, K))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: QuantizePlan(K, bits=8, int8=True)(X[:, :128].contiguous().float()),
            "x: expected contiguous bfloat16",
        ),
        (lambda: DownPlan(GPU, K, (normal(0, 32, 64), None), None)(X), r"shared: expected .* \[any, 256\]"),
        (
            lambda: LinearPlan(GPU, make_weight(4, False, 128), [], torch.bfloat16)(X[:, :128], None, [], None, None),
            r"base: expected .* \[any, 256\]",
        ),
    ],
)
def test_everything_is_checked_where_the_environment_asks_for_it(
    call: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "CHECK", True)
    with pytest.raises(ValueError, match=said):
        call()


def test_a_quantizer_is_its_reference() -> None:
    x = X.half()
    found, expected = QuantizePlan(K, bits=8, int8=True)(x), quantize_reference(x, bits=8, int8=True)
    assert torch.equal(found.base, expected.base)
    assert torch.equal(found.token_scale, expected.token_scale)


class Compiled:
    """A kernel as Triton returns it."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *given: self.launched.append((grid, given))


class Jit:
    """A function as Triton decorates it."""

    def __init__(self) -> None:
        self.kernel, self.asked = Compiled(), 0

    def warmup(self, *given: object, **options: object) -> Compiled:
        self.asked += 1
        return self.kernel


def test_a_launch_asks_triton_once_and_then_hands_arguments_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_kernels.launch.INTERPRET", False)
    function = Jit()
    launch = Launch(function, (64, True), warps=4, stages=3)
    for _ in range(2):
        launch.compile(("x", 7))
    launch((3, 1, 1), ("y", 9))
    assert function.asked == 1
    assert function.kernel.launched == [((3, 1, 1), ("y", 9, 64, True))]


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before a CUDA graph is captured: kernels for w4a8"):
        compile_all("w4a8", torch.device("cuda", 0), [])


def test_kernels_are_compiled_at_the_same_time(caplog: pytest.LogCaptureFixture) -> None:
    """Two jobs that wait for each other are done only if both run."""
    import threading

    caplog.set_level("INFO")
    barrier = threading.Barrier(2, timeout=20)
    done: list[int] = []
    compile_all("two", torch.device("cpu"), [lambda: done.append(barrier.wait()) for _ in range(2)])
    assert sorted(done) == [0, 1]
    assert not caplog.records, "that took no second"
