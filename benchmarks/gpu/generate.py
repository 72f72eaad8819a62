"""Our checkpoints in transformers on a GPU: the answers of the kernels beside the plain formula's, and their speed.

    python benchmarks/gpu/generate.py                       on the GPU: ten minutes, and 4 GiB of its memory
    python benchmarks/gpu/generate.py --cpu-check           the same calls on a CPU, tiny: its seconds mean nothing

writes benchmarks/results/generate_cuda.json. First the bundled outlier model: greedy answers to its questions in bf16,
and whether the plain formula would have chosen each token as well. Then a model of random weights of the width of
Qwen2-VL-7B with few blocks: seconds of one decoding step through its blocks, for several numbers of tokens, in bf16, by
the kernels, and un-fused, with the branches as matrix products of their own. A step has no context, so that linears
are what is compared; it is replayed as a CUDA graph. Its floor is reading all weights and factors once.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from qe_kernels import Down, ops
from qe_pipelines.results import write_result
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "training"), str(Path(__file__).parent)]

from kernel_bench.timing import rates, seconds  # noqa: E402
from synthetic import Shape, write_model  # noqa: E402

from qe_dist import archs  # noqa: E402
from qe_dist.core.quantized import GroupInput  # noqa: E402
from qe_dist.data.samples import load_images, read_samples  # noqa: E402
from qe_dist.flow.config import RunConfig  # noqa: E402
from qe_dist.flow.local import quantize  # noqa: E402
from qe_dist.methods.recipes import load_recipe  # noqa: E402
from qe_dist.serve import linear, on_kernels, on_reference  # noqa: E402

ARCH = archs.get("qwen2_vl")
MODEL, DATA = ROOT / "models" / "outlier", ROOT / "models" / "data"
ANSWERED = ("qe-w4a16g64", "qe-w4a8", "qe-w4a6", "rtn-w4a8", "qe-extract-w4a6")
TIMED = ("rtn-w4a16g128", "qe-w4a16g128", "qe-w4a8", "qe-extract-w4a8")
WIDE = Shape(hidden=3584, intermediate=18944, blocks=4, heads=28, kv_heads=4)
TINY = Shape(hidden=64, intermediate=128, blocks=1, heads=2, kv_heads=1)


class _SeparateInput(on_kernels.Input):
    """The input scale and down projections by torch."""

    def __init__(self, part: GroupInput, *rest: Any) -> None:
        super().__init__(replace(part, shared_down=None, expert_down=None), *rest)
        self.shared, self.experts = (
            None if f is None else f.dense.bfloat16() for f in (part.shared_down, part.expert_down)
        )

    def prepare(self, x: Tensor, expert: Tensor | None, modality: Tensor | None) -> on_kernels.Prepared:
        made = super().prepare(x, expert, modality)
        scaled = x if self.part.input_scale is None else (x / self.part.input_scale).to(x.dtype)
        shared = None if self.shared is None else scaled @ self.shared.T
        experts = None if self.experts is None else torch.einsum("mk,erk->mer", scaled, self.experts)
        return made._replace(down=Down(shared, experts, None))


class _SeparateLinear(on_kernels.Linear):
    """Up projections as matrix products, added one by one."""

    def __init__(self, words: Tensor, scale: Tensor, repair: Any, *rest: Any) -> None:
        super().__init__(words, scale, repair, *rest)
        self.dense = {n: (f if isinstance(f, Tensor) else f.dense).bfloat16() for n, f in repair.items()}

    def __call__(self, x: on_kernels.Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        made = x.activations
        y = ops.linear(made.base, made.token_scale, self.weight, bias=bias, out_dtype=dtype)
        zs = {
            "shared_up": x.down.shared_z, "shared_columns": made.shared_z, "expert_up": x.down.expert_z,
            "expert_columns": made.expert_z, "salient_columns": made.salient_z,
        }  # fmt: skip
        return sum((self._branch(zs[name], up, x.expert) for name, up in self.dense.items()), y)

    def _branch(self, z: Tensor, up: Tensor, expert: Tensor | None) -> Tensor:
        z = z[..., : up.shape[-1]]  # without the zeros that fill ranks up
        if up.dim() == 2:
            return z @ up.T
        if z.dim() == 3:
            z = z.gather(1, expert.long()[:, None, None].expand(-1, 1, z.shape[2]))[:, 0]
        return torch.einsum("mr,mor->mo", z, up[expert])


UNFUSED = SimpleNamespace(Input=_SeparateInput, Linear=_SeparateLinear)


@contextmanager
def run_by(module: ModuleType | SimpleNamespace) -> Iterator[None]:
    """Instead of what the device and dtype would choose."""
    before, linear.backend = linear.backend, lambda device, dtype: module
    try:
        yield
    finally:
        linear.backend = before


def load(folder: Path, device: torch.device) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


def quantized(source: Path, data: Path, names: Sequence[str], root: Path, device: torch.device) -> dict[str, Path]:
    quantize(*(RunConfig(source, load_recipe(name), data, root / name, device=device.type) for name in names))
    return {name: root / name for name in names}


def inputs_of(example: Any, device: torch.device, answer: Tensor | None = None) -> dict[str, Tensor]:
    """Of one prompt, perhaps with an answer behind it."""
    inputs = ARCH.model_inputs([example], pad=0)
    if answer is not None:
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                fill = answer[None] if name == "input_ids" else torch.full_like(answer[None], name == "attention_mask")
                inputs[name] = torch.cat((inputs[name], fill.to(inputs[name])), dim=1)
    return {n: t.to(device, torch.bfloat16) if t.is_floating_point() else t.to(device) for n, t in inputs.items()}


@torch.no_grad()
def agreement(folder: Path, device: torch.device, questions: int) -> dict[str, Any]:
    """How many greedy answers of the kernels the plain formula would have given, token by token."""
    encoder = ARCH.encoder(folder)
    samples = [s for s in read_samples(DATA / "evaluation.jsonl") if s.messages][:questions]
    asked = [encoder.prompt(s, load_images(s)) for s in samples]
    with run_by(on_kernels):
        model = load(folder, device)
        told = [
            model.generate(**inputs_of(e, device), max_new_tokens=16, do_sample=False)[0, e.input_ids.numel() :].cpu()
            for e in asked
        ]
    same = 0
    with run_by(on_reference):
        model = load(folder, device)
        for example, answer in zip(asked, told, strict=True):
            logits = model(**inputs_of(example, device, answer), use_cache=False).logits[0, -len(answer) - 1 : -1]
            same += int((logits.argmax(dim=-1).cpu() == answer).all())
    return {"questions": len(asked), "same": same}


@torch.no_grad()
def step_seconds(model: Any, tokens: int, device: torch.device) -> float:
    """One decoding step of so many tokens through all blocks, without context."""
    decoder = model.get_decoder()
    width = decoder.config.hidden_size
    hidden = torch.randn(tokens, 1, width, device=device).bfloat16()
    turn = decoder.rotary_emb(hidden, torch.zeros(3, tokens, 1, dtype=torch.long, device=device))

    def step() -> None:
        states = hidden
        for block in decoder.layers:
            states = block(states, position_embeddings=turn)

    return seconds([step], device)


def speed(shape: Shape, tokens: Sequence[int], names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Seconds of a step, by recipe, way of running, and number of tokens."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_model(root / "model", shape)
        found = {"bf16": {"bytes": _bytes(root / "model"), "plain": _steps(root / "model", tokens, device)}}
        folders = quantized(root / "model", DATA / "calibration.jsonl", names, root, device)
        for name, folder in folders.items():
            row: dict[str, Any] = {"bytes": _bytes(folder)}
            for how, module in (("kernels", on_kernels), ("unfused", UNFUSED)):
                with run_by(module):
                    row[how] = _steps(folder, tokens, device)
            found[name] = row
    return found


def _steps(folder: Path, tokens: Sequence[int], device: torch.device) -> dict[str, float]:
    model = load(folder, device)
    return {str(count): step_seconds(model, count, device) for count in tokens}


def _bytes(folder: Path) -> int:
    """Of the blocks' tensors on disk."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            total += sum(tensors.get_tensor(n).nbytes for n in tensors.keys() if "layers." in n)  # noqa: SIM118
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu-check", action="store_true")
    check = parser.parse_args().cpu_check
    if not check and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --cpu-check makes the same calls on a CPU")
    device = torch.device("cpu" if check else "cuda")
    with tempfile.TemporaryDirectory() as temporary:
        names = ANSWERED[-1:] if check else ANSWERED
        folders = quantized(MODEL, DATA / "calibration.jsonl", names, Path(temporary), device)
        answers = {name: agreement(folder, device, 3 if check else 200) for name, folder in folders.items()}
    print(answers)
    shape, timed = (TINY, ("rtn-w4a16g32", "qe-extract-w4a8")) if check else (WIDE, TIMED)
    tokens = (1, 3) if check else (1, 16, 64)
    found = speed(shape, tokens, timed, device)
    print(found)
    if check:
        return
    result = {
        "device": torch.cuda.get_device_name(),
        "shape": asdict(shape),
        "tokens": tokens,
        "rates": asdict(rates(device)),
        "answers": answers,
        "speed": found,
    }
    write_result(ROOT / "benchmarks" / "results" / "generate_cuda.json", result)


if __name__ == "__main__":
    main()
