"""The bytes of a Qwen2-VL checkpoint for every recipe, so that a change of the code that should change none is seen.

    python -m tests.recorded.checkpoints          compares with checkpoints.json, and names what differs
    python -m tests.recorded.checkpoints --write  records anew, after a change that was meant

Libraries choose their kernels by the processor, and so the last bits of a sum. The variables below make them choose
the same ones on every x86-64 machine; they are read when the libraries are loaded, hence a process of its own.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from qe_dist import archs
from qe_dist.flow.config import RunConfig, by_rotation
from qe_dist.flow.local import quantize
from qe_dist.io.publish import sha256
from qe_dist.methods.recipes import METHODS, load_recipe
from tests.tiny import calibration, tiny_model

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "1",
}  # fmt: skip
RECORDED = Path(__file__).with_suffix(".json")
FORMATS = ("w4a16", "w4a8", "w4a6")
OTHERS = ("serq+gptq-w4a4", "qe-extract-w3a16", "obq-w4a6", "smoothquant+lists+gptq+qera-w4a6@0.5f4")
TUNED = ("rtn+tune-w4a16g64", "lists+qera+tune-w3a8g64@1f4")
WIDER = {"qe-w4a16": "qe-w4a16@0.5", "qe-w4a8": "qe-w4a8@0.5"}
"""Lists of channels and scales of rows use up a quarter of a bit on layers as narrow as these."""


def model(folder: Path) -> Path:
    """Wide enough for groups of 128."""
    config = dict(archs.get("qwen2_vl").tiny)
    text = config["text_config"] | {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    return tiny_model(folder, config=config | {
        "text_config": text, "vision_config": config["vision_config"] | {"hidden_size": 128},
    })  # fmt: skip


def found(folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of the files of each checkpoint, by recipe."""
    names = [*(f"{method}-{form}" for method in METHODS for form in FORMATS), *OTHERS]
    source, data = model(folder / "model"), calibration(folder / "data")

    runs = {
        name: RunConfig(
            source, load_recipe(WIDER.get(name, name)), data, folder / name, samples_per_batch=3, sample_tokens=256
        )
        for name in names
    }
    for together in by_rotation(list(runs.values())):
        quantize(*together)
    narrow = RunConfig(
        tiny_model(folder / "narrow"), load_recipe("gptq-w4a8"), data, folder / "padded", tensor_parallel_size=2
    )
    quantize(narrow)
    runs["gptq-w4a8, padded for 2 ranks"] = narrow
    more = calibration(folder / "more", 16)
    for name in TUNED:
        recipe = load_recipe(name)
        recipe = replace(recipe, tuning=replace(recipe.tuning, steps=8))
        runs[name] = RunConfig(source, recipe, more, folder / name, samples_per_batch=4, sample_tokens=256)
        quantize(runs[name])
    return {name: hashes(one.output) for name, one in runs.items()}


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of the tensors and of config.json, without the version of transformers in it; the manifest has others."""
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("transformers_version")
    text = json.dumps(config, sort_keys=True).encode()
    files = {path.name: sha256(path)[:16] for path in sorted(checkpoint.glob("*.safetensors"))}
    return files | {"config.json": hashlib.sha256(text).hexdigest()[:16]}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        now = found(Path(folder))
    if "--write" in sys.argv:
        RECORDED.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    before = json.loads(RECORDED.read_text())
    different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    print("\n".join(f"{name}: {before.get(name)} recorded, {now.get(name)} now" for name in different))
    return len(different)


if __name__ == "__main__":
    sys.exit(main())
