"""What a run asks of object storage, beside the floor: the model once, the checkpoint once.

    python benchmarks/object_storage.py      writes benchmarks/results/object_storage.json

Needs s3fs and moto[server]: the real S3 protocol on this machine, with a meter in front of it. The run from s3:// with
a mirror there must give the bytes of the run from disk; then the disk is thrown away and the run comes back.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # tests.s3

from qe_pipelines.results import write_result  # noqa: E402

from qe_dist.flow import local  # noqa: E402
from qe_dist.flow.config import RunConfig  # noqa: E402
from qe_dist.io.bucket import Bucket  # noqa: E402
from qe_dist.methods.recipes import load_recipe  # noqa: E402
from tests.s3 import BUCKET, s3_server  # noqa: E402

MODELS = ROOT / "models"


def checkpoint(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def timed(run: RunConfig) -> float:
    start = time.perf_counter()
    local.quantize(run)
    return time.perf_counter() - start


def metered(meter, run: RunConfig) -> dict[str, float]:
    meter.reset()
    seconds = timed(run)
    weights = [get for get in meter.gets if get.startswith("model/") and get.endswith(".safetensors")]
    return {
        "seconds": seconds,
        "bytes_out": meter.bytes_out,
        "bytes_in": meter.bytes_in,
        "gets": len(meter.gets),
        "gets_of_weights": len(weights),
        "puts": len(meter.puts),
    }


def measure(root: Path, model: Path, recipe: str) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    run = RunConfig(
        model, load_recipe(recipe), MODELS / "data" / "calibration.jsonl", root / "local", sample_tokens=512
    )
    seconds = timed(run)
    with s3_server() as meter:
        there = Bucket(f"s3://{BUCKET}/model")
        for path in model.iterdir():
            there.put(path, path.name)
        remote = replace(run, model=there.url, output=root / "remote", mirror=f"s3://{BUCKET}/mirror")
        whole = metered(meter, remote)
        shutil.rmtree(remote.output)
        back = metered(meter, remote)
    assert checkpoint(remote.output) == checkpoint(run.output), "not the bytes of the run from disk"
    return {
        "model": model.name,
        "recipe": recipe,
        "floor": {
            "model_bytes": sum(p.stat().st_size for p in model.iterdir()),
            "checkpoint_bytes": sum(p.stat().st_size for p in run.output.iterdir() if p.is_file()),
        },
        "disk_seconds": seconds,
        "remote": whole,
        "empty_disk": back,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "plain")
    parser.add_argument("--recipe", default="qe-w4a6")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "object_storage.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = measure(Path(root), args.model, args.recipe)
    write_result(args.output, result)
    print(result)


if __name__ == "__main__":
    main()
