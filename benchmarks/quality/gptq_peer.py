"""Our GPTQ beside llm-compressor's, on the same weights and Gram matrices: errors, and seconds of one thread.

    PYTHONPATH=.:pipelines .venv-peer/bin/python benchmarks/quality/gptq_peer.py

writes benchmarks/results/gptq_peer.json. The virtual environment has llmcompressor and jaxtyping. Both round to the
same grid (symmetric, scale = largest weight / 7.5 at 4 bits, in bf16, fixed before the first channel), in the same
order, with 1 % damping. tests/methods/test_gptq_peer.py holds our code to the errors that are written here.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from qe_pipelines.results import write_result
from torch import Tensor

from qe_dist.core.determinism import pin
from qe_dist.numerics.gptq import gptq
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale

RESULT = Path(__file__).parent.parent / "results" / "gptq_peer.json"


@dataclass(frozen=True)
class Case:
    outputs: int
    inputs: int
    bits: int
    group_size: int | None
    act_order: bool


CASES = [
    Case(outputs, inputs, bits, group_size, act_order)
    for outputs, inputs, bits, group_size in [
        (192, 256, 4, None),
        (192, 256, 8, None),
        (192, 256, 3, 64),
        (128, 640, 4, 128),
        (128, 640, 3, 32),
        (320, 200, 4, None),  # no multiple of any block
    ]
    for act_order in (True, False)
]
LARGE = [Case(8960, 1536, 4, None, True), Case(1536, 8960, 4, None, True), Case(1536, 8960, 3, 128, True)]
"""The widths of Qwen2-VL-2B, for the seconds."""


def problem(case: Case) -> tuple[Tensor, Tensor]:
    """A bf16 weight, and the Gram matrix of inputs that are correlated, of very different size, and dead in places."""
    random = torch.Generator().manual_seed(case.inputs)
    tokens, factors = min(2 * case.inputs, 4096), case.inputs // 8
    x = torch.randn(tokens, factors, generator=random) @ torch.randn(factors, case.inputs, generator=random)
    x = 0.3 * x + torch.randn(tokens, case.inputs, generator=random)
    x *= torch.exp(torch.randn(case.inputs, generator=random))
    x[:, :: case.inputs // 3] = 0.0
    weight = torch.randn(case.outputs, case.inputs, generator=random) / case.inputs**0.5
    return weight.bfloat16().float(), x.T @ x


def relative(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Error of the output, relative to the output."""
    e, w, g = (weight - rounded).double(), weight.double(), gram.double()
    return float((((e @ g) * e).sum() / ((w @ g) * w).sum()).sqrt())


def ours(case: Case, weight: Tensor, gram: Tensor) -> Tensor:
    scale = weight_scale(weight, case.bits, case.group_size)
    codes, scale = gptq(weight, gram, case.bits, case.group_size, scale=scale, act_order=case.act_order)
    return dequantize(codes, scale)


def peer(case: Case, weight: Tensor, gram: Tensor) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe

    args = QuantizationArgs(
        num_bits=case.bits,
        symmetric=True,
        strategy="group" if case.group_size else "channel",
        group_size=case.group_size,
        actorder="static" if case.act_order else None,
    )
    module = torch.nn.Linear(case.inputs, case.outputs, bias=False, dtype=torch.bfloat16)
    module.weight.data.copy_(weight)
    module.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=args)
    initialize_observer(module, "weight")
    observe(module, "weight")
    found = module.weight_observer.get_qparams()
    rounded, _, gave_up = quantize_weight(
        weights=weight[None].clone(),
        hessians=gram[None].clone(),
        scale=found["scale"][None].float(),  # else its products are rounded to bf16 as well
        zero_point=found["zero_point"][None],
        global_scale=None,
        quant_args=args,
    )
    assert not gave_up.any()
    return rounded[0]


def timed(method: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, float]:
    start = time.process_time()
    return method(*arguments), time.process_time() - start


def compare(case: Case) -> dict[str, Any]:
    weight, gram = problem(case)
    plain = weight_scale(weight, case.bits, case.group_size)
    rounded = dequantize(round_to_grid(weight, plain, case.bits), plain)
    (mine, seconds), (theirs, peer_seconds) = (timed(m, case, weight, gram) for m in (ours, peer))
    return asdict(case) | {
        "plain_rounding": relative(weight, rounded, gram),
        "ours": relative(weight, mine, gram),
        "peer": relative(weight, theirs, gram),
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "gflop": (case.inputs**3 / 3 + case.outputs * case.inputs**2) / 1e9,
    }


def main() -> None:
    pin(1)
    a = torch.randn(2048, 2048)
    a @ a
    seconds = timed(lambda: a @ a)[1]
    rows = []
    for case in CASES + LARGE:
        rows.append(compare(case))
        print(rows[-1])
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    write_result(RESULT, {"peer": versions, "gflop_per_second": 2 * 2048**3 / seconds / 1e9, "cases": rows})


if __name__ == "__main__":
    main()
