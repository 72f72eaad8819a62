"""A model directory as named tensors: checked when it is opened, read when asked for."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qe_dist.core.errors import CheckpointError
from qe_dist.io.weights import HEADER_GUESS, SafetensorsSource

MIB = 2**20


def model(folder, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def damaged(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_a_tensor_comes_as_it_was_saved(tmp_path, same):
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.empty(0, 4)}
    source = SafetensorsSource(model(tmp_path, tensors))
    assert {name: source.shape(name) for name in source.names()} == {"a": (3, 5), "b": (7,), "c": (0, 4)}
    assert same({name: source.get(name) for name in source.names()}, tensors)


def test_a_header_longer_than_the_guess_is_read_whole(tmp_path):
    tensors = {f"{i:05d}.{'x' * 200}": torch.zeros(1) for i in range(HEADER_GUESS // 200)}
    assert len(SafetensorsSource(model(tmp_path, tensors)).names()) == len(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.extend(b"more"),
        lambda c: c.__delitem__(slice(-1, None)),
        lambda c: c.__delitem__(slice(20, None)),
        lambda c: c.__setitem__(slice(0, 8), b"\xff" * 8),
        lambda c: c.__setitem__(slice(8, 12), b"oops"),
        lambda c: c.__setitem__(slice(c.index(b"[3,5]"), c.index(b"[3,5]") + 5), b"[3,6]"),
    ],
    ids=["empty", "longer", "shorter", "header cut", "header of 2^64 bytes", "no JSON", "another shape"],
)
def test_a_damaged_shard_is_named_when_the_model_is_opened(tmp_path, change):
    damaged(model(tmp_path, {"a": torch.zeros(3, 5)}) / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors .* may be truncated"):
        SafetensorsSource(tmp_path)


def cached(path):
    """Bytes of a file in the page cache."""
    return int(subprocess.run(["fincore", "-nb", "-o", "RES", path], capture_output=True, text=True, check=True).stdout)


def drop_from_cache(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("a file system in memory")


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore of util-linux tells what is cached")
def test_prefetch_brings_the_tensors_into_the_page_cache_and_little_else(tmp_path):
    path = model(tmp_path, {n: torch.zeros(4 * MIB) for n in "abcd"}) / "model.safetensors"
    source = SafetensorsSource(tmp_path)
    drop_from_cache(path)
    source.prefetch(["b"])
    deadline = time.monotonic() + 10
    while cached(path) < 16 * MIB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 16 * MIB <= cached(path) < 32 * MIB


def test_a_tensor_that_was_dropped_keeps_no_page_of_its_shard_mapped(tmp_path):
    source = SafetensorsSource(model(tmp_path, {n: torch.zeros(4 * MIB) for n in "abcd"}))
    source.get("b")  # brings in what torch loads at its first use
    before = mapped()
    held = source.get("a")
    assert mapped() - before >= 16 * MIB
    del held
    assert mapped() - before < 1 * MIB


def mapped():
    """Bytes of files that count as memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss_File:")).split()[1])


def test_nan_deep_in_a_large_tensor_is_found(tmp_path):
    tensor = torch.zeros(5 * MIB)
    tensor[-1] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w contains NaN or Inf"):
        SafetensorsSource(model(tmp_path, {"w": tensor})).get("w")
