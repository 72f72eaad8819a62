"""Exit codes of the command line: 2 for input, 75 for what the same command continues."""

import subprocess
import tempfile

import pytest
from qe_pipelines import main

from qe_dist.core.errors import (
    CheckpointError,
    ConfigError,
    NoRoomError,
    QEError,
    Stopped,
    TemporaryError,
    TemporaryFileError,
)
from qe_dist.data.scratch import Scratch
from qe_dist.io.publish import publish_json
from qe_dist.io.run_dir import RunDir
from tests.io.test_faults import mounted
from tests.tiny import calibration, tiny_model


def code_of(call, monkeypatch):
    """The exit code of `qe-dist` when a command does this."""
    monkeypatch.setattr(main, "app", lambda **_: call())
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (QEError, 2), (ConfigError, 2), (CheckpointError, 2),
        (TemporaryError, 75), (NoRoomError, 75), (TemporaryFileError, 75), (Stopped, 75),
    ],
)  # fmt: skip
def test_input_ends_with_2_and_a_loss_with_75(kind, code, monkeypatch, capsys):
    def fails():
        raise kind("what happened")

    assert code_of(fails, monkeypatch) == code
    assert capsys.readouterr().err.count("what happened") == 1


def test_a_disk_that_fills_up_ends_with_75(tmp_path, monkeypatch):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16k", "tmpfs"):
        assert code_of(lambda: publish_json(tmp_path / "disk" / "a.json", "x" * 2**16), monkeypatch) == 75


def test_a_disk_without_room_for_images_of_a_table_ends_with_75(tmp_path, monkeypatch):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16k", "tmpfs"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
        scratch = Scratch()
        assert code_of(lambda: scratch.put(bytes(2**16)), monkeypatch) == 75
        scratch.close()


def test_a_folder_that_may_not_be_written_ends_with_2(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        assert code_of(lambda: publish_json(tmp_path / "disk" / "a.json", "x"), monkeypatch) == 2


def test_a_damaged_batch_that_is_made_anew_ends_with_75(tmp_path, monkeypatch):
    batch = RunDir(tmp_path)._batch_path(2, 0, "activations")
    batch.parent.mkdir(parents=True)
    batch.write_bytes(b"damaged")
    assert code_of(lambda: RunDir(tmp_path).get_batch(2, 0), monkeypatch) == 75
    assert not batch.exists()


def test_a_disk_without_room_for_the_checkpoint_ends_with_75_before_the_work(tmp_path, monkeypatch):
    model, data, disk = tiny_model(tmp_path / "model"), calibration(tmp_path / "data"), tmp_path / "disk"
    words = ["quantize", str(model), "--recipe", "qe-w4a6", "--calibration", str(data), "--output", str(disk / "out")]
    monkeypatch.setattr("sys.argv", ["qe-dist", *words])
    with mounted(disk, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 75
        assert subprocess.run(["ls", "-A", disk], capture_output=True, text=True).stdout == ""
