"""Measures checkpoints against their model by Ray tasks, each in its own process, as many as memory allows."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qe_pipelines.entries import Entry, is_control, scheme_of

GIB = 2**30


def measure(runs: Sequence[Any], arch: Any, examples: Any) -> list[Entry]:
    """Measures the checkpoint of every run against the model in full precision. Returns entries in the order of the
    runs.

    Until this returns, the reference's hidden states lie beside the checkpoints, where every worker can read them.
    """
    from qe_dist.checkpoint.memory import evaluation_bytes

    model, device = runs[0].model, runs[0].device
    folder = Path(tempfile.mkdtemp(prefix=".reference-", dir=runs[0].output.parent))
    try:
        finished([(_reference, (model, arch, examples, folder), model, evaluation_bytes(model, device))], device)
        tasks = [
            (_measured, (r.output, arch, examples, folder), r.output, evaluation_bytes(r.output, device)) for r in runs
        ]
        return finished(tasks, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finished(tasks: Sequence[tuple[Any, tuple[Any, ...], Path, int]], device: str) -> list[Any]:
    """Runs tasks on Ray, as many at a time as fit into the memory of the nodes, and returns their results in order.

    tasks: function, arguments, the folder that it evaluates, and the bytes that it needs. Raises TemporaryError when a
    process is killed, and ConfigError when no node has enough memory.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

    from qe_dist.core.errors import TemporaryError

    _check_room(tasks)
    gpus = 0 if device == "cpu" else 1
    asked = [
        ray.remote(do).options(num_cpus=1, num_gpus=gpus, memory=size, max_retries=0).remote(*given)
        for do, given, _, size in tasks
    ]
    results = []
    for task, (_, _, folder, size) in zip(asked, tasks, strict=True):
        try:
            results.append(ray.get(task))
        except RayTaskError as error:
            raise error.cause from None
        except (OutOfMemoryError, WorkerCrashedError):
            raise TemporaryError(
                f"the process that evaluates {folder} was killed; it counted on {size / GIB:.1f} GiB, and most likely "
                "the machine had no memory left. End what else runs there, give fewer --workers, or evaluate block by "
                "block: qe-dist eval --stream"
            ) from None
        except RayError as error:
            said = " ".join(str(error).split())
            raise TemporaryError(
                f"the process that evaluates {folder} was lost with its node: {said}; type the same command again"
            ) from None
    return results


def _check_room(tasks: Sequence[tuple[Any, tuple[Any, ...], Path, int]]) -> None:
    """Raises ConfigError for a task that no node has memory for: Ray would wait for ever."""
    import ray

    from qe_dist.core.errors import ConfigError

    room = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
    for _, _, folder, size in tasks:
        if size > room:
            raise ConfigError(
                f"to evaluate {folder} takes a process of {size / GIB:.1f} GiB, but the largest node gives Ray's tasks "
                f"{room / GIB:.1f} GiB; end what else runs there, or evaluate block by block: qe-dist eval --stream"
            )


def _reference(model: Path, arch: Any, examples: Any, folder: Path) -> Path:
    from qe_dist.checkpoint.evaluate import save_reference
    from qe_dist.serve.loading import load_model

    return save_reference(load_model(model), arch, examples, folder)


def _measured(checkpoint: Path, arch: Any, examples: Any, reference: Path) -> Entry:
    from qe_dist.checkpoint.evaluate import evaluate
    from qe_dist.io.checkpoint import read_manifest
    from qe_dist.io.run_dir import RunDir
    from qe_dist.serve.loading import load_model

    found = evaluate(load_model(checkpoint), arch, examples, reference)
    quality, manifest, store = found.summary(), read_manifest(checkpoint), RunDir(checkpoint)
    return Entry(
        recipe=checkpoint.name,
        scheme=scheme_of(manifest.recipe["scheme"]),
        bits=manifest.bits_per_weight,
        active_bits=manifest.active_bits_per_weight,
        macs=manifest.macs_per_weight,
        accuracy=quality.get("accuracy"),
        perplexity=quality["perplexity"],
        kl=quality["kl"],
        kinds=quality["kinds"],
        fit_seconds=sum(store.block_report(block.index)["fit_seconds"] for block in manifest.blocks),
        fallbacks=len(manifest.fallbacks),
        arithmetic=manifest.arithmetic,
        control=is_control(manifest.recipe),
        mib=manifest.checkpoint_bytes / 2**20,
        agreement=quality["agreement"],
        intervals=quality["intervals"],
        modalities=quality["modalities"],
        scores=found.columns(),
    )
