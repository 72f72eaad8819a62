"""The custom ops: legal for torch.compile, equal to the references on a CPU, and to the kernels where they run."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qe_kernels import Branch, Order, Weight, dense, extracted_columns, ops, order_for, pack_up, pack_weight, workspaces
from qe_kernels.branches import Up
from qe_kernels.dispatch import Device
from qe_kernels.down import down_reference
from qe_kernels.factors import Factor
from qe_kernels.linear import linear_reference
from qe_kernels.quantize import Activations
from qe_kernels.quantize_reference import quantize_reference
from qe_kernels.split_k import Workspace
from torch import Tensor

M, K, N, E, D = 5, 256, 130, 3, 8
BF16 = 2.0**-7
CPU = torch.device("cpu")
GPU = Device("interpreter", (8, 0), processors=2)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(seed: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(bits: int, int8: bool, group_size: int | None) -> Weight:
    words = torch.randint(-(2**31), 2**31, (N, K * bits // 32), generator=torch.Generator().manual_seed(1))
    scale = normal(2, N, 1 if group_size is None else K // group_size).abs() / K
    return pack_weight(words.to(torch.int32), bits, scale, K, order_for(GPU.capability), int8, group_size)


def packed(factor: Factor) -> Up:
    return pack_up(factor, order_for(GPU.capability))


X = normal(0, M, K)
EXPERT = torch.tensor([2, -1, 0, 2, 2], dtype=torch.int32)
SHARED, SALIENT = torch.arange(3), torch.tensor([7, 200])
EXTRACTED = torch.arange(E * D).view(E, D) * 5
MASK = extracted_columns(K, SHARED, EXTRACTED)
CHANNELS = {"shared_channels": SHARED, "expert_channels": EXTRACTED, "expert": EXPERT, "extracted": MASK}
QUANTIZE = [
    {"bits": None, "int8": False},
    {"bits": None, "int8": False, "norm_weight": normal(3, K), "with_x": False},
    {"bits": 8, "int8": True},
    {"bits": 6, "int8": False, "outliers": 16, "input_scale": normal(4, 1, K).abs() + 1},
    {"bits": 4, "int8": True, "gated": True, "with_x": False},
    {"bits": 8, "int8": True, "norm_weight": normal(3, K), "salient_channels": SALIENT, **CHANNELS},
    {"bits": None, "int8": False, **CHANNELS},
    {
        "bits": 8, "int8": False, "input_scale": normal(4, 2, K).abs() + 1,
        "modality": torch.tensor([0, 1, 1, 0, 1], dtype=torch.int8),
    },
]  # fmt: skip
DOWN = [
    {"shared": (normal(5, 40, K), None)},
    {"experts": (codes(6, E, 16, K), normal(7, E, 16)), "expert": EXPERT},
    {"router": normal(8, 2, E, K, dtype=torch.float32), "router_x": X},
    {
        "shared": (codes(9, 10, K // 2, dtype=torch.uint8), normal(10, 10)),
        "experts": (codes(11, E, 4, K // 2, dtype=torch.uint8), normal(35, E, 4)),
        "router": normal(8, 1, E, K, dtype=torch.float32), "router_x": X,
    },
]  # fmt: skip
BRANCHES = [
    Branch(normal(12, M, 64), packed((codes(13, N, 20, dtype=torch.uint8), normal(14, N).abs() / 100))),
    Branch(normal(15, M, E, 32), packed((codes(16, E, N, 16), normal(17, E, N).abs() / 1000)), E),
    Branch(normal(18, M, 32), packed((normal(19, E, N, D), None)), E),
]
LINEAR = [
    {"base": X, "token_scale": None, "weight": make_weight(4, False, 128)},
    {
        "base": codes(20, M, K), "token_scale": normal(21, M, dtype=torch.float32).abs(), "out_dtype": torch.bfloat16,
        "weight": make_weight(4, True, None), "branches": BRANCHES, "expert": EXPERT, "bias": normal(22, N),
    },
    {
        "base": codes(20, M, K).bfloat16(), "token_scale": normal(21, M, dtype=torch.float32).abs(),
        "weight": make_weight(3, False, 32), "branches": BRANCHES[:2], "expert": EXPERT,
    },
]  # fmt: skip


ROTATE = [
    {"factors": (normal(36, 4, 4, dtype=torch.float32), normal(37, 64, 64, dtype=torch.float32))},
    {"factors": tuple(normal(38, n, n, dtype=torch.float32) for n in (2, 8, 4))},
]


def given_x(how: dict) -> Tensor:
    return normal(0, M, 2 * K) if how.get("gated") else X


def fields(result: object) -> list[Tensor | None]:
    return list(vars(result).values())


def assert_same(found: object, expected: object) -> None:
    for name, a, b in zip(vars(found), fields(found), fields(expected), strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("how", QUANTIZE)
def test_quantize_is_its_reference_on_a_cpu(how: dict) -> None:
    x = given_x(how)
    assert_same(ops.quantize(x, **how), quantize_reference(x, **how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("how", ROTATE)
def test_rotate_multiplies_blocks_by_the_kronecker_product(how: dict, dtype: torch.dtype) -> None:
    """In float32, rounded once to the dtype of x."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in how["factors"]:
        matrix = torch.kron(matrix, factor.double())
    exact = X.to(dtype).double() @ torch.block_diag(*[matrix] * (K // len(matrix)))
    found = ops.rotate(X.to(dtype), how["factors"])
    assert found.dtype == dtype
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_what_quantize_does_not_change_is_x_itself() -> None:
    assert ops.quantize(X, **QUANTIZE[0]) == Activations(X, X, None, None, None, None)
    assert ops.quantize(X, **QUANTIZE[2]).x is X


@pytest.mark.parametrize("how", DOWN)
def test_down_is_its_reference_on_a_cpu(how: dict) -> None:
    assert_same(ops.down(X, **how), down_reference(X, **how))


def test_route_is_down_with_a_router_alone() -> None:
    router = DOWN[2]["router"]
    assert torch.equal(ops.route(router, X), down_reference(X, router=router, router_x=X).expert)


@pytest.mark.parametrize("how", LINEAR)
def test_linear_is_its_reference_on_a_cpu(how: dict) -> None:
    assert torch.equal(ops.linear(**how), linear_reference(**{"out_dtype": torch.bfloat16, **how}))


class Recorder:
    """Calls an op's implementation, and keeps its arguments for opcheck."""

    def __init__(self, op: Callable) -> None:
        self.op, self.arguments = op, ()

    def __call__(self, *arguments: object) -> object:
        self.arguments = arguments
        return self.op(*arguments)


@pytest.mark.parametrize(
    ("name", "how"),
    [("quantize", how) for how in QUANTIZE[1:]]
    + [("rotate", how) for how in ROTATE]
    + [("down", how) for how in DOWN]
    + [("linear", how) for how in LINEAR],
)
@pytest.mark.parametrize("tokens", [M, 0])
def test_ops_keep_the_rules_of_torch(name: str, how: dict, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors and tracing with dynamic shapes; also without tokens."""
    recorder = Recorder(getattr(ops, f"_{name}"))
    monkeypatch.setattr(ops, f"_{name}", recorder)
    how = {key: of_tokens(value, tokens) for key, value in how.items()}
    how |= {} if name == "linear" else {"x": given_x(how)[:tokens]}
    getattr(ops, name)(**how)
    torch.library.opcheck(recorder.op, recorder.arguments)


def of_tokens(value: object, tokens: int) -> object:
    """The same for the first tokens."""
    if isinstance(value, list):
        return [replace(branch, z=branch.z[:tokens]) for branch in value]
    return value[:tokens] if isinstance(value, Tensor) and len(value) == M else value


def layer(x: Tensor, weight: Weight) -> Tensor:
    """All three ops as a layer calls them."""
    made = ops.quantize(x, bits=8, int8=True)
    z = ops.down(x, (SHARED_DOWN, None), (EXPERT_DOWN, None), ROUTER, x)
    branches = [Branch(z.shared_z, SHARED_UP), Branch(z.expert_z, EXPERT_UP, E)]
    return ops.linear(made.base, made.token_scale, weight, branches, z.expert[0], out_dtype=x.dtype)


SHARED_DOWN, SHARED_UP = normal(30, 32, K), packed((normal(31, N, 16), None))
EXPERT_DOWN, EXPERT_UP = normal(32, E, 32, K), packed((normal(33, E, N, 16), None))
ROUTER = normal(34, 1, E, K, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_to_one_graph_for_any_number_of_tokens(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(4, True, None)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (M, 3):
        assert torch.equal(compiled(X[:tokens], weight), layer(X[:tokens], weight))


def test_what_is_refused_is_refused_when_it_is_traced() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="x: expected contiguous bfloat16 or float16"):
        torch.compile(layer, backend="eager", fullgraph=True)(X.float(), make_weight(4, True, None))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter plays the GPU."""
    monkeypatch.setattr(ops, "device_of", lambda device: GPU)


def close(found: Tensor, exact: Tensor) -> bool:
    """Up to the roundings of bf16, of which the interpreter truncates some."""
    size = exact.square().mean().sqrt()
    return bool(((found.double() - exact).abs() <= BF16 * (exact.abs() + 4 * size)).all())


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("how", [QUANTIZE[2], QUANTIZE[5]])
def test_the_kernel_of_quantize_runs(how: dict) -> None:
    """In fp16, for the interpreter truncates to bf16. The sum of a norm has another order than torch's."""
    x, how = X.half(), {name: value.half() if name == "norm_weight" else value for name, value in how.items()}
    found, expected = ops.quantize(x, **how), quantize_reference(x, **how)
    assert (found.base.int() - expected.base.int()).abs().max() <= ("norm_weight" in how)
    assert torch.allclose(found.token_scale, expected.token_scale, rtol=0.01)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("how", DOWN)
def test_the_kernel_of_down_runs(how: dict) -> None:
    found, expected = ops.down(X, **how), down_reference(X.double(), **how)
    assert found.shared_z is None or close(found.shared_z, expected.shared_z)
    assert found.expert is None or torch.equal(found.expert, expected.expert)
    if found.expert_z is not None:
        own = how.get("expert", None if found.expert is None else found.expert[0]).long()
        tokens = torch.arange(M)[own >= 0]
        assert close(found.expert_z[tokens, own[own >= 0]], expected.expert_z[tokens, own[own >= 0]])


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dequantized_once", [False, True])
@pytest.mark.parametrize("how", LINEAR)
def test_the_kernels_of_linear_run(how: dict, dequantized_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if dequantized_once:
        monkeypatch.setattr(ops, "choose", lambda *_: None)
        monkeypatch.setattr(dense, "SLAB", 64 * K)  # three slabs, the last one narrow
    exact = linear_reference(**how | {"out_dtype": torch.float64, "compute": torch.float64})
    assert close(ops.linear(**how), exact)


@pytest.mark.usefixtures("on_gpu")
def test_a_weight_for_another_gpu_is_refused() -> None:
    weight = LINEAR[0]["weight"]
    other = next(order for order in Order if order is not weight.order)
    with pytest.raises(ValueError, match=f"weight: expected the {weight.order} order for cpu, found .* {other} order"):
        ops.linear(**LINEAR[0] | {"weight": replace(weight, order=other)})


@pytest.mark.usefixtures("on_gpu")
def test_memory_that_is_not_aligned_is_refused() -> None:
    memory = torch.zeros(M * K + 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="base: expected memory aligned to 16 bytes"):
        ops.linear(**LINEAR[0] | {"base": memory[1:].view(M, K)})


@pytest.mark.usefixtures("on_gpu")
def test_experts_may_be_a_row_of_several_routers_choices() -> None:
    """Which begins anywhere."""
    rows = torch.stack((EXPERT, EXPERT.flip(0)))
    assert rows[1].data_ptr() % 16
    found = ops.down(X, **DOWN[1] | {"expert": rows[1]}).expert_z
    assert torch.equal(found[0, 2], ops.down(X, **DOWN[1] | {"expert": EXPERT.flip(0)}).expert_z[0, 2])
    how = QUANTIZE[5] | {"expert": rows[1]}
    assert torch.equal(ops.quantize(X, **how).expert_z, ops.quantize(X, **how | {"expert": rows[1].clone()}).expert_z)


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """cuda(stream, capturing) sets what torch says of the current stream."""

    def set_stream(stream: int, capturing: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    monkeypatch.setattr(workspaces, "_allocated", {})
    monkeypatch.setattr(Workspace, "allocate", classmethod(lambda cls, *_: cls(torch.empty(1), torch.empty(1))))
    return set_stream


def test_a_stream_keeps_its_workspace_and_shares_it_with_no_other(cuda: Callable[..., None]) -> None:
    device, found = torch.device("cuda", 0), []
    for stream in (1, 2, 1):
        cuda(stream)
        found.append(workspaces.workspace_of(device))
    assert found[0] is found[2]
    assert found[0] is not found[1]
    cuda(3, capturing=True)
    graphs = workspaces.workspace_of(device)
    assert all(graphs is not other for other in found)
    cuda(4, capturing=True)
    assert workspaces.workspace_of(device) is graphs


def test_nothing_is_allocated_while_a_graph_is_captured(cuda: Callable[..., None]) -> None:
    cuda(1, capturing=True)
    with pytest.raises(RuntimeError, match="run the model once before a CUDA graph is captured"):
        workspaces.workspace_of(torch.device("cuda", 0))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from qe_kernels import ops
x = torch.ones(2, 8, dtype=torch.bfloat16)
assert ops.quantize(x, bits=8, int8=True).base.eq(127).all()
assert ops.down(x, (x, None)).shared_z.eq(8).all()
assert ops.rotate(x, [torch.ones(4, 4)]).eq(4).all()
"""


def test_without_triton_the_references_run() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
