"""One decoder block of random weights through the real Stage: seconds and memory of each part, beside its floor.

    python benchmarks/gpu/block.py                          a narrow block, on the CPU, in a minute
    python benchmarks/gpu/block.py --device cuda --hidden 8192 --intermediate 29568 --heads 64 --kv-heads 8 \
        --tokens 262144                                     a block of Qwen2-VL-72B

writes benchmarks/results/block_DEVICE.json. The floor of a part is its work (work.py) at the rates that this machine
reaches in large matrix products and copies. A part's seconds are its own, without those of parts inside it, and the
device is waited for at both ends. Memory is that of the device's tensors, or on a CPU that of the whole process.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from qe_pipelines.results import write_result

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "training"), str(Path(__file__).parent)]

from synthetic import Shape as ModelShape  # noqa: E402
from synthetic import write_model  # noqa: E402
from work import Load, Rates, Shape, work  # noqa: E402

from qe_dist import archs  # noqa: E402
from qe_dist.core.batch import IMAGE, TEXT, Batch  # noqa: E402
from qe_dist.core.determinism import tensor_cores  # noqa: E402
from qe_dist.flow import stage as stages  # noqa: E402
from qe_dist.flow.config import RunConfig  # noqa: E402
from qe_dist.flow.plan import StagePlan  # noqa: E402
from qe_dist.io.run_dir import RunDir  # noqa: E402
from qe_dist.io.weights import SafetensorsSource  # noqa: E402
from qe_dist.methods import recipe as recipes  # noqa: E402
from qe_dist.methods.footprint import footprint  # noqa: E402
from qe_dist.methods.recipe import Recipe  # noqa: E402
from qe_dist.methods.recipes import load_recipe  # noqa: E402
from qe_dist.numerics import stats  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
ARCH = archs.get("qwen2_vl")


class Clock:
    """Seconds of each part by itself, and the peak of memory while it ran."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self._running = ["other"]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        """Books what was since the last turn to the part that is running."""
        if self.on_gpu:
            torch.cuda.synchronize()
        part, now = self._running[-1], time.perf_counter()
        self.seconds[part] += now - self._since
        self.peak[part] = max(self.peak[part], self._memory())
        self._since = time.perf_counter()

    def _memory(self) -> int:
        """The most bytes since the last call."""
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # the mark goes back to what is used now
        return 1024 * int(line.split()[1])

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        return timed


def places(recipe: Recipe) -> Iterator[tuple[Any, str, str]]:
    """(owner, attribute, part) of everything that is timed."""
    yield stages._Block, "__init__", "load"
    yield type(ARCH), "run_block", "forward"
    yield stats, "add_gram", "gram"
    yield stats.TokenSample, "smallest_with", "sample"
    yield stats.GroupStats, "update", "channels"
    yield type(recipe.transform), "fit", "transform"
    yield type(recipe.quantizer), "fit", "round"
    if hasattr(recipe.compensation, "gains"):
        yield type(recipe.compensation), "gains", "share"
    yield type(recipe.compensation), "fit", "repair"
    yield recipes, "stored", "store"
    yield recipes, "with_report", "report"
    yield stages, "block_tensors", "pack"
    yield stages, "report_dict", "layout"
    yield RunDir, "put_block", "publish"


class Timed:
    """The clock, while it listens."""

    def __init__(self, device: str, recipe: Recipe) -> None:
        self.clock, self.recipe = Clock(device), recipe

    def __enter__(self) -> Clock:
        self.before = [(owner, name, vars(owner)[name]) for owner, name, _ in places(self.recipe)]
        for owner, name, part in places(self.recipe):
            setattr(owner, name, self.clock.part(part, vars(owner)[name]))
        return self.clock

    def __exit__(self, *_: object) -> None:
        self.clock._turn()
        for owner, name, original in self.before:
            setattr(owner, name, original)


def best(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    found = float("inf")
    for _ in range(repeats + 1):  # the first one is slow
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found = min(found, time.perf_counter() - start)
    return found


def measured_rates(device: str, folder: Path) -> Rates:
    """Of products in the dtype of the activations and in float32, of copies, and of reading the weights again."""
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device, dtype=dtype)
    row = torch.randn(size, device=device)
    shards = list(folder.glob("*.safetensors"))
    area, files = size * size, sum(f.stat().st_size for f in shards)
    return Rates(
        flop=2.0 * size**3 / best(lambda: b @ b, device),
        flop32=2.0 * size**3 / best(lambda: a @ a, device),
        rough=2.0 * size**3 / best(lambda: rough_product(a), device),
        decomposed=area * size / 3 / best(lambda: torch.linalg.cholesky_ex(a @ a.T), device),
        bytes=2.0 * a.nbytes / best(a.clone, device),
        disk=files / best(lambda: [f.read_bytes() for f in shards], device, repeats=1),
        calls=1000 / best(lambda: [row.mul_(1.0) for _ in range(1000)], device),
    )


def rough_product(a: torch.Tensor) -> torch.Tensor:
    with tensor_cores():
        return a @ a


def batches(folder: Path, hidden: int, load: Load, dtype: torch.dtype) -> Iterator[Batch]:
    """Samples whose first half is an image; a few channels are loud, as in trained models."""
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    rotary = Qwen2VLRotaryEmbedding(Qwen2VLConfig.from_pretrained(folder).text_config)
    count = load.batch // load.length
    places = torch.arange(load.length).expand(3, count, -1)
    modality = torch.full((count, load.length), TEXT, dtype=torch.int8)
    modality[:, : load.length // 2] = IMAGE
    loud = torch.ones(hidden).index_fill(0, torch.arange(0, hidden, 256), 10.0)
    for index in range(load.tokens // load.batch):
        random = torch.Generator().manual_seed(index)
        states = (torch.randn(count, load.length, hidden, generator=random) * loud).to(dtype)
        cos, sin = rotary(states, places)
        ids = torch.arange(count) + count * index
        yield Batch(index, states, modality, ids, {"cos": cos, "sin": sin})


def measure(shape: Shape, name: str, device: str, load: Load) -> dict[str, Any]:
    """Loads, streams, fits and publishes one block."""
    recipe = load_recipe(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, ModelShape(**asdict(shape), blocks=1))
        run = RunConfig(folder, recipe, folder, Path(temporary) / "out", device=device, sample_tokens=load.sample)
        load = replace(load, itemsize=run.dtype.itemsize)
        block = ARCH.spec(SafetensorsSource(folder)).blocks[0]
        rates = measured_rates(device, folder)
        with Timed(device, recipe) as clock:
            clock._memory()  # forgets the peak of writing the model
            idle = clock._memory()
            stage = stages.Stage([run], "qwen2_vl")
            stage.load(StagePlan(0, (block,)))
            forward, fit = clock.part("move", stage.forward), clock.part("other of fit", stage.fit)
            for batch in batches(folder, shape.hidden, load, run.dtype):
                forward(batch)
            fit(0)
        report = RunDir(run.output).block_report(0)
    seconds = {part: spent for part, spent in clock.seconds.items() if part != "other"}  # which made the batches
    parts = work(block, recipe, load)
    memory = footprint(block, [recipe], load.sample, load.batch, load.itemsize)
    rows = {
        part: {
            "seconds": spent,
            "floor": rates.floor(part, parts[part]) if part in parts else None,
            "predicted": rates.seconds(part, parts[part]) if part in parts else None,
            "peak_bytes": clock.peak[part] - idle,
        }
        for part, spent in seconds.items()
    }
    return {
        "shape": asdict(shape),
        "recipe": name,
        "load": asdict(load),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "rates": asdict(rates),
        "parts": rows,
        "seconds": sum(seconds.values()),
        "floor": sum(row["floor"] or 0.0 for row in rows.values()),
        "peak_bytes": max(clock.peak.values()) - idle,
        "expected_peak_bytes": memory.peak,
        "memory": asdict(memory),
        "fallbacks": report["fallbacks"],
    }


def table_of(result: dict[str, Any]) -> str:
    lines = [f"{'part':14}{'seconds':>9}{'floor':>9}{'x':>7}{'predicted':>11}{'peak MiB':>10}"]
    for part, row in result["parts"].items():
        floor, predicted = row["floor"] or 0.0, row["predicted"] or 0.0
        ratio = f"{row['seconds'] / floor:7.1f}" if floor else " " * 7
        lines.append(
            f"{part:14}{row['seconds']:9.3f}{floor:9.3f}{ratio}{predicted:11.3f}{row['peak_bytes'] / 2**20:10.0f}"
        )
    lines.append(f"{'all':14}{result['seconds']:9.3f}{result['floor']:9.3f}")
    peak, expected = (result[k] / 2**20 for k in ("peak_bytes", "expected_peak_bytes"))
    return "\n".join([*lines, f"peak {peak:.0f} MiB, expected {expected:.0f} MiB; fall-backs: {result['fallbacks']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    narrow = Shape(hidden=1024, intermediate=3072, heads=8, kv_heads=2)
    for name, default in asdict(narrow).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2048, help="tokens at a time")
    parser.add_argument("--sample", type=int, default=2048, help="tokens in the sample of every group")
    parser.add_argument("--recipe", default="qe-w4a6")
    given = parser.parse_args()
    shape = Shape(given.hidden, given.intermediate, given.heads, given.kv_heads)
    load = Load(tokens=given.tokens, batch=given.batch, sample=given.sample)
    result = measure(shape, given.recipe, given.device, load)
    print(table_of(result))
    write_result(RESULTS / f"block_{given.device}.json", result)


if __name__ == "__main__":
    sys.exit(main())
