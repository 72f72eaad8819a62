"""Publishing: all of a file or nothing, a message that says what to do, and what was written is what is read."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qe_dist.core.errors import CheckpointError
from qe_dist.io import publish as publishing
from qe_dist.io.publish import (
    digest,
    publish,
    publish_json,
    publish_sealed,
    publish_tensors,
    read_json,
    read_sealed,
    refresh,
    sha256,
)


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 20 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


BIG = {"w": torch.zeros(100_000)}


@pytest.mark.parametrize(
    ("write", "content"), [(publish_tensors, BIG), (publish_sealed, BIG), (publish_json, "x" * 100_000)]
)
def test_a_full_disk_leaves_no_file_and_says_so(tmp_path, full_disk, write, content):
    with pytest.raises(
        CheckpointError, match=r"block\.safetensors could not be written: File too large; free some space"
    ):
        write(tmp_path / "block.safetensors", content)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_publish_keeps_what_was_there(tmp_path, full_disk):
    path = tmp_path / "run.json"
    publish_json(path, {"a": 1})
    with pytest.raises(CheckpointError):
        publish_json(path, "x" * 100_000)
    assert path.read_text() == '{\n "a": 1\n}\n'


def test_writers_on_several_hosts_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    """Two hosts may give the same process id to two writers of one file."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = []

    def write(path, text):
        seen.append(path)
        path.write_text(text)
        if text == "outer":
            publish(tmp_path / "f", lambda p: write(p, "inner"))

    publish(tmp_path / "f", lambda p: write(p, "outer"))
    assert len(set(seen)) == 2
    assert (tmp_path / "f").read_text() == "outer"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_file_and_every_new_folder_are_synced_before_publish_returns(tmp_path, monkeypatch):
    synced = []
    sync = publishing._sync
    monkeypatch.setattr(publishing, "_sync", lambda path: (synced.append(path), sync(path)))
    publish_json(tmp_path / "a" / "b" / "run.json", 1)
    temporary = synced.pop(-2)
    assert temporary.name.startswith(".run.json.")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "half": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("write", [publish_tensors, publish_sealed])
def test_the_same_tensors_give_the_same_bytes_in_whatever_order_they_come(tmp_path, write):
    write(tmp_path / "a", TENSORS)
    write(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_file(tmp_path / "a").keys() == TENSORS.keys()


EVERY_TYPE = {f"t{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(publishing.DTYPES.values())}
SHAPES = {
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0),
    "turned": torch.arange(6).reshape(2, 3).T,
    '"ü': BIG["w"],
}


@pytest.mark.parametrize("tensors", [{}, TENSORS, EVERY_TYPE, SHAPES], ids=["empty", "some", "types", "shapes"])
def test_the_library_reads_what_we_write_and_the_hash_is_that_of_the_file(tmp_path, same, tensors):
    found = publish_tensors(tmp_path / "a", tensors)
    assert same(load_file(tmp_path / "a"), tensors)
    assert found == sha256(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_lies_on_a_multiple_of_its_width(tmp_path):
    publish_tensors(tmp_path / "a", EVERY_TYPE)
    content = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    for name, said in json.loads(content[8:start]).items():
        if name != "__metadata__":
            assert said["data_offsets"][0] % EVERY_TYPE[name].element_size() == 0


def test_others_can_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    publish_tensors(tmp_path / "a", TENSORS)
    os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_sealed_file_comes_back_as_it_went(tmp_path, same):
    publish_sealed(tmp_path / "a", TENSORS)
    assert same(read_sealed(tmp_path / "a"), TENSORS)


def test_every_changed_or_missing_byte_of_a_sealed_file_is_seen(tmp_path):
    path = tmp_path / "a"
    publish_sealed(path, TENSORS)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{path} is damaged"):
            read_sealed(path)
    for length in (0, 7, 8, 50, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{path} is damaged"):
            read_sealed(path)


def test_a_file_that_was_never_sealed_is_not_trusted(tmp_path):
    publish_tensors(tmp_path / "a", TENSORS)
    with pytest.raises(CheckpointError, match="expected None, found"):
        read_sealed(tmp_path / "a")


def test_the_digest_depends_on_names_types_shapes_and_values():
    one = torch.zeros(2, 3)
    different = [
        {"a": one}, {"b": one}, {"a": one.reshape(3, 2)}, {"a": one.int()}, {"a": one + 1}, {"a": one, "b": one},
    ]  # fmt: skip
    assert len({digest(x) for x in different}) == len(different)
    assert digest({"a": one.T}) == digest({"a": one.T.contiguous()})


def test_to_look_anew_changes_the_folder_and_leaves_nothing(tmp_path):
    """It is the change that makes an NFS client forget what it knew; where none is allowed, it does no harm."""
    os.utime(tmp_path, (0, 0))
    refresh(tmp_path)
    assert tmp_path.stat().st_mtime > 0
    assert list(tmp_path.iterdir()) == []
    refresh(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", '{"a": ', "\x00\xff"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        read_json(tmp_path / "run.json")
