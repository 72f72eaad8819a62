"""Whether the files of a checkpoint are those that its manifest lists."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qe_dist.core.manifest import Manifest
from qe_dist.io.publish import digest, sha256

NAMED = 3
"""Most changed tensors of a file that a fault names."""


def settings_digest(quantization_config: Mapping[str, Any]) -> str:
    """SHA-256 of the quantization_config of config.json. Users may edit the rest of that file."""
    return hashlib.sha256(json.dumps(quantization_config, sort_keys=True).encode()).hexdigest()


def settings_faults(config: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """A fault when config.json is not the one that the manifest was written with."""
    if manifest.quantization_config == settings_digest(config["quantization_config"]):
        return []
    return ["config.json: its quantization_config is not that of the manifest"]


def file_faults(folder: Path, manifest: Manifest) -> list[str]:
    """The faults of a checkpoint, at most one per file: missing, not listed, or changed, with the changed tensors.

    Reads every file once, several at a time, a few MiB of each in memory.
    """
    listed = manifest.files
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _fault(folder / name, listed[name], manifest.tensors.get(name, {})), listed))
    present = {path.name for path in folder.glob("*.safetensors")}
    return [fault for fault in found if fault] + [f"{n}: not in the manifest" for n in sorted(present - {*listed})]


def _fault(path: Path, expected: str, tensors: Mapping[str, str]) -> str:
    if not path.exists():
        return f"{path.name}: missing"
    found = sha256(path)
    if found == expected:
        return ""
    return f"{path.name}: SHA-256 expected {expected}, found {found}{_changed(path, tensors)}"


def _changed(path: Path, expected: Mapping[str, str]) -> str:
    """Names the tensors of a file that differ from their digests."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: digest({name: file.get_tensor(name)}) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        return f" (cannot be read: {error})"
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not of this checkpoint" for name in found if name not in expected]
    faults += [f"{name} is not as written" for name in found if found[name] != expected.get(name, found[name])]
    more = [f"{len(faults) - NAMED} more"] if len(faults) > NAMED else []
    return f" ({', '.join(faults[:NAMED] + more)})" if faults else ""
