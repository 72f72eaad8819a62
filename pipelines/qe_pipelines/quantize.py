"""`qe-dist quantize`: quantizes a model into a low-bit checkpoint, and continues a run that was interrupted."""

import json
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from qe_dist.core.errors import ConfigError
from qe_pipelines.cluster import place
from qe_pipelines.console import TO_QUANTIZE, require
from qe_pipelines.models import Revision, model_at
from qe_pipelines.progress import log, run_view, set_up_logging
from qe_pipelines.reading import SOURCE, reads_samples

if TYPE_CHECKING:
    from qe_dist.core.manifest import Manifest
    from qe_dist.flow.config import RunConfig


@reads_samples
def quantize(
    model: Annotated[str, typer.Argument(help="folder, URL (s3://, gs://), or name on the Hugging Face hub")],
    recipe: Annotated[str, typer.Option(help="named recipe, or a TOML file")],
    calibration: Annotated[str, typer.Option(help=SOURCE)],
    output: Annotated[Path, typer.Option(help="directory of the checkpoint; holds the run meanwhile")],
    workers: Annotated[int | None, typer.Option(help="default: one per GPU, else one per CPU (at most 4)")] = None,
    ray_address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: start one here")] = None,
    revision: Revision = None,
    resume: Annotated[str, typer.Option(help="auto, required or never")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    samples_per_batch: Annotated[int, typer.Option(help="calibration samples per batch")] = 8,
    sample_tokens: Annotated[int, typer.Option(help="tokens kept per input group to fit experts on")] = 4096,
    blocks_per_worker: Annotated[int | None, typer.Option(help="default: as many as memory allows")] = None,
    memory: Annotated[str | None, typer.Option(help="of a worker, like 20GiB; default: most of what is free")] = None,
    host_memory: Annotated[str | None, typer.Option(help="for Gram matrices that a GPU has no room for")] = None,
    embed_device: Annotated[str | None, typer.Option(help="cpu: embed on nodes without a GPU")] = None,
    from_block: Annotated[int, typer.Option(help="first block that --recipe is for; others stay as they are")] = 0,
    tensor_parallel_size: Annotated[int, typer.Option(help="ranks that shall serve it: pads or refuses for them")] = 1,
    mirror: Annotated[str | None, typer.Option(help="URL that gets a copy of all that is finished")] = None,
    worker_timeout: Annotated[float, typer.Option(help="seconds to wait for workers; minutes where nodes boot")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads per worker", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    quiet: Annotated[bool, typer.Option(help="print errors only")] = False,
    log_file: Annotated[Path | None, typer.Option(help="also write a line per block here")] = None,
    reading: Any = None,
) -> None:
    """Quantize MODEL into a checkpoint that transformers loads after `import qe_dist`."""
    set_up_logging(log_file)
    require(*TO_QUANTIZE)
    address, here = place(ray_address, {"--device": device, "--embed-device": embed_device})
    from qe_cluster import driver

    from qe_dist.flow.config import RunConfig
    from qe_dist.methods.recipes import load_recipe

    run = RunConfig(
        model=model_at(model, revision),
        recipe=load_recipe(recipe),
        calibration=calibration,
        output=output,
        workers=here.workers(threads) if workers is None and address is None else workers,
        resume=resume,  # type: ignore[arg-type]
        device=here.device if device == "auto" else device,
        samples_per_batch=samples_per_batch,
        sample_tokens=sample_tokens,
        blocks_per_worker=blocks_per_worker,
        memory=num_bytes("--memory", memory),
        host_memory=num_bytes("--host-memory", host_memory),
        embed_device=embed_device,
        from_block=from_block,
        tensor_parallel_size=tensor_parallel_size,
        mirror=mirror,
        threads=threads,
        seed=seed,
        reading=replace(reading, seed=seed),
    )
    with stopping() as stop, run_view(quiet) as view:
        summary = driver.quantize(run, address=address, listen=view, stop=stop, worker_timeout=worker_timeout)
    _tell(summary_lines(summary, run), quiet)


def _tell(lines: Iterable[str], quiet: bool) -> None:
    """Into the log, and, unless it shall be quiet, to the terminal."""
    for line in lines:
        log.info(line)
        if not quiet:
            typer.echo(line)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that what is in flight is finished; a second one ends the
    process."""
    stop = threading.Event()

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def num_bytes(option: str, text: str | None) -> int | None:
    """Bytes of a size such as 20GiB, 500MB or 1000000. Raises ConfigError, naming the option, for anything else."""
    try:
        return None if text is None else TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ConfigError(f"{option} must be a size like 20GiB, found {text!r}") from None


def summary_lines(summary, run: "RunConfig") -> list[str]:
    """The last lines of a run. Tensor-parallel sizes are told where one was asked for."""
    from qe_dist.checkpoint.serving import served_sizes
    from qe_dist.io.checkpoint import read_manifest

    output, manifest = run.output, read_manifest(run.output)
    peak = max((s["peak_mib"] for s in summary.stages), default=0.0)
    forward = sum(s["forward"] for s in summary.stages)
    fit = sum(s["fit"] for s in summary.stages)
    lines = [
        *cost_lines(manifest, output),
        f"took {summary.seconds:.1f} s (workers: forward {forward:.1f} s, fit {fit:.1f} s), "
        f"{summary.tokens} tokens, peak memory of a worker {peak:.0f} MiB",
    ]
    if summary.continued:
        lines.append(f"continued: {summary.continued} blocks were finished before")
    if run.tensor_parallel_size > 1:
        lines.append(served_sizes(json.loads((output / "config.json").read_text())))
    lines.append(f"fall-backs: {len(summary.fallbacks) or 'none'}")
    lines += [f"  {layer}: {'; '.join(steps)}" for layer, steps in summary.fallbacks.items()]
    return lines


def cost_lines(manifest: "Manifest", output: Path) -> Iterator[str]:
    """What a checkpoint costs on disk, and per quantized weight for one token."""
    size = manifest.checkpoint_bytes
    macs = " + ".join(f"{count:.3f} {name}" for name, count in manifest.macs_by_arithmetic.items() if count)
    yield (
        f"wrote {output}: {size / 2**20:.1f} MiB in all files, {8 * size / manifest.parameters:.2f} bits per "
        "parameter of the model"
    )
    yield (
        f"per quantized weight: {manifest.bits_per_weight:.2f} bits stored, "
        f"{manifest.active_bits_per_weight:.2f} read for a token, {macs} multiplications; its product is "
        f"{manifest.arithmetic}"
    )
