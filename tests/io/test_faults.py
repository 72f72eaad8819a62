"""What a machine does to a run: full and read-only disks, damaged files, killed writers, clocks that jump.

Each is named clearly, nothing finished is lost, and the same call ends with the same bytes once the cause is gone.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qe_dist import archs
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.flow.stage import Stage
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model

BLOCKS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of four blocks in waves of one."""
    root = tmp_path_factory.mktemp("whole")
    config = dict(archs.get("qwen2_vl").tiny)
    config["text_config"] = config["text_config"] | {"num_hidden_layers": BLOCKS}
    model = tiny_model(root / "model", config=config)
    run = RunConfig(
        model, load_recipe("qe-w4a6"), calibration(root / "data", 4), root / "out",
        samples_per_batch=2, sample_tokens=64, blocks_per_worker=1,
    )  # fmt: skip
    quantize(run)
    return run


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def finished(run):
    return [i for i in range(BLOCKS) if RunDir(run.output).has_block(i)]


class Puts:
    """The blocks that were published while this was watching; ends the run, as a kill would, before block `stop`."""

    def __init__(self, patch, stop=None):
        self.blocks, put_block = [], RunDir.put_block

        def watched(store, index, *rest):
            if index == stop:
                raise KeyboardInterrupt
            self.blocks.append(index)
            put_block(store, index, *rest)

        patch.setattr(RunDir, "put_block", watched)


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """A run of the same that was killed when two of its four blocks were finished."""
    run = replace(whole, output=tmp_path_factory.mktemp("killed") / "out")
    with pytest.MonkeyPatch.context() as patch:
        Puts(patch, stop=2)
        with pytest.raises(KeyboardInterrupt):
            quantize(run)
    assert finished(run) == [0, 1]
    return run


@pytest.fixture
def half(killed, tmp_path):
    """A copy of it to continue."""
    return replace(killed, output=shutil.copytree(killed.output, tmp_path / "out"))


@pytest.fixture
def fitted(monkeypatch):
    """The blocks that were fitted since."""
    return Puts(monkeypatch).blocks


@contextmanager
def mounted(folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not let us mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.startswith(".") and p.name != ".run"]


@pytest.mark.parametrize("room", [30, 330, 420, 500])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(whole, tmp_path, monkeypatch, fitted, room):
    """room: KiB that the disk has; each ends the run in another place."""
    room_enough = SimpleNamespace(free=2**40)  # else the plan would refuse before the first byte
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room_enough)
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={room}k", "tmpfs"):
        run = replace(whole, output=disk / "out")
        with pytest.raises(CheckpointError, match=rf"{disk}.* could not be written: No space left on device.*free"):
            quantize(run)
        assert not RunDir(run.output).is_complete
        assert leftovers(disk) == []
        done = finished(run)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        fitted.clear()
        quantize(run)
        assert sorted(done + fitted) == list(range(BLOCKS))
        assert files(run.output) == files(whole.output)


def test_when_a_call_has_failed_nothing_of_it_writes_any_more(whole, tmp_path, monkeypatch):
    begun, ended, put_batch = threading.Event(), threading.Event(), RunDir.put_batch

    def slow(*args):
        begun.set()
        time.sleep(0.2)
        put_batch(*args)
        ended.set()

    def fails(*_):
        begun.wait()
        raise LookupError

    monkeypatch.setattr(RunDir, "put_batch", slow)
    monkeypatch.setattr(Stage, "forward", fails)
    with pytest.raises(LookupError):
        quantize(replace(whole, output=tmp_path / "out"))
    assert ended.is_set()


def test_a_disk_that_becomes_read_only_is_named_and_the_run_goes_on_when_it_is_not(half, whole, tmp_path, fitted):
    with mounted(half.output, "--bind", "-o", "ro", str(half.output)):
        before = files(half.output / ".run" / "blocks")
        with pytest.raises(
            CheckpointError, match=rf"{half.output}.* could not be written: Read-only file system.*mend"
        ):
            quantize(half)
        assert files(half.output / ".run" / "blocks") == before
    assert fitted in ([], [2])
    fitted.clear()
    quantize(half)
    assert fitted == [2, 3]
    assert files(half.output) == files(whole.output)


def test_a_new_run_on_a_read_only_disk_is_refused_and_writes_nothing(whole, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        with pytest.raises((CheckpointError, ConfigError), match=r"disk.*(Read-only file system|free)"):
            quantize(replace(whole, output=tmp_path / "disk" / "out"))
        assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("damage", [flip, cut], ids=["changed", "truncated"])
def test_a_damaged_spool_is_named_and_made_anew_by_the_same_call(half, whole, damage, fitted):
    batch = half.output / ".run" / "activations" / "block-00002" / "batch-00001.safetensors"
    damage(batch)
    with pytest.raises(CheckpointError, match=rf"{batch} is damaged: .*type the same command again"):
        quantize(half)
    quantize(half)
    assert fitted == [2, 3]
    assert files(half.output) == files(whole.output)


@pytest.mark.parametrize("damage", [flip, cut, os.unlink], ids=["changed", "truncated", "gone"])
def test_a_damaged_block_alone_is_made_anew(half, whole, damage, fitted):
    damage(RunDir(half.output).place("block-00000"))
    quantize(half)
    assert fitted == [0, 2, 3]
    assert files(half.output) == files(whole.output)


@pytest.mark.parametrize("damage", [flip, cut], ids=["changed", "truncated"])
def test_a_damaged_part_of_the_passthrough_alone_is_made_anew(half, whole, damage, fitted):
    damage(RunDir(half.output).place("passthrough-00001"))
    quantize(half)
    assert fitted == [2, 3]
    assert files(half.output) == files(whole.output)


def test_a_finished_checkpoint_that_was_damaged_is_mended_as_verify_says(whole, tmp_path, fitted):
    """Remove its config.json and type the same command again."""
    run = replace(whole, output=tmp_path / "out")
    shutil.copytree(whole.output, run.output)
    flip(run.output / "block-00001.safetensors")
    (run.output / "config.json").unlink()
    quantize(run)
    assert fitted == [1]
    assert files(run.output) == files(whole.output)


WRITER = """
import sys, torch
from pathlib import Path
from qe_dist.io.run_dir import RunDir

store = RunDir(Path(sys.argv[1]))
tensors = {"w": torch.zeros(2**25)}
print("ready", flush=True)
while True:
    store.put_file("block-00002", tensors, {})
    store.forget_file("block-00002")
"""


def test_what_a_killed_writer_left_does_no_harm_and_is_swept(half, whole, fitted):
    """Killed in the middle of 128 MiB: a temporary file stays."""
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, half.output], stdout=subprocess.PIPE)
        writer.stdout.readline()
        while not leftovers(half.output):
            assert writer.poll() is None
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if leftovers(half.output):
            break
    assert leftovers(half.output)
    RunDir(half.output).forget_file("block-00002")  # it may have come as far as that
    quantize(half)
    assert fitted == [2, 3]
    assert leftovers(half.output) == []
    assert files(half.output) == files(whole.output)


@pytest.mark.parametrize("jump", [-1e9, 1e9], ids=["back", "ahead"])
def test_a_clock_that_jumps_changes_nothing(half, whole, fitted, monkeypatch, jump):
    """In the process, and in what the file system remembers."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() + jump) * 1e9))
    for path in half.output.rglob("*"):
        os.utime(path, (now() + jump, now() + jump))
    quantize(half)
    assert fitted == [2, 3]
    assert files(half.output) == files(whole.output)
