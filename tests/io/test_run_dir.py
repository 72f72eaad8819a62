"""What is finished stays finished; what is damaged is named, forgotten, and alone made anew."""

import re

import pytest
import torch

from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.publish import publish_tensors
from qe_dist.io.run_dir import RunDir


@pytest.fixture
def store(tmp_path):
    return RunDir(tmp_path)


def batch(index: int) -> Batch:
    modality = torch.zeros(1, 3, dtype=torch.int8)
    return Batch(index, torch.randn(1, 3, 4), modality, torch.tensor([5]), {"cos": torch.ones(1, 3, 2)})


def put_blocks(store, *indices):
    for index in indices:
        store.put_block(index, {"w": torch.full((2,), float(index))}, {"index": index})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_batch_comes_back_as_it_went(store, same):
    one = batch(3)
    store.put_batch(0, one)
    assert same(store.get_batch(0, 3), one)


def flipped(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"), [(cut, ""), (flipped, r"SHA-256 of its tensors expected [0-9a-f]{64}, found [0-9a-f]{64}")]
)
def test_a_damaged_batch_is_named_and_removed(store, damage, said):
    store.put_batch(0, batch(0))
    damage(next(store.root.rglob("batch-*.safetensors")))
    with pytest.raises(CheckpointError, match=rf"batch-00000\.safetensors is damaged: {said}.*the same command again"):
        store.get_batch(0, 0)
    assert not store.has_batch(0, 0)


def test_batches_are_dropped_by_boundary(store):
    for block in (0, 2, 4):
        store.put_batch(block, batch(0))
    store.drop_batches_before(4)
    assert [store.has_batch(b, 0) for b in (0, 2, 4)] == [False, False, True]


def test_a_block_counts_as_finished_only_with_its_report(store):
    publish_tensors(store.finished / f"{store.block_name(0)}.safetensors", {"w": torch.zeros(2)})
    assert not store.has_block(0)
    put_blocks(store, 0)
    assert store.has_block(0)


def test_a_run_continues_at_the_last_complete_wave_before_the_first_unfinished_block(store):
    assert store.last_spooled(0, num_batches=2) == 0
    for index in (0, 1):
        store.put_batch(2, batch(index))
    store.put_batch(3, batch(0))  # the wave behind it is not whole
    assert store.last_spooled(3, num_batches=2) == 2


@pytest.mark.parametrize("moved", [False, True], ids=["in .run", "moved up"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, r"block-00001\.safetensors is damaged: SHA-256 expected [0-9a-f]{64}, found [0-9a-f]{64}"),
        (cut, r"block-00001\.safetensors is damaged: expected \d+ bytes, found \d+"),
        (lambda path: path.unlink(), r"block-00001\.safetensors is missing"),
    ],
)
def test_of_the_finished_files_a_damaged_one_is_named_and_alone_forgotten(store, damage, said, moved):
    put_blocks(store, 0, 1, 2)
    assert store.check_files() == []
    if moved:  # as an interrupted assemble leaves it
        store.place("block-00001").rename(store.output / "block-00001.safetensors")
    damage(store.place("block-00001"))
    (fault,) = store.check_files()
    assert re.search(said, fault)
    assert [store.has_block(i) for i in range(3)] == [True, False, True]
    assert not store.place("block-00001").exists()
    assert store.check_files() == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"bytes": 3}'])
def test_a_damaged_report_is_named_and_its_block_forgotten(store, content):
    put_blocks(store, 0, 1)
    (store.finished / "block-00000.json").write_text(content)
    assert store.check_files() == [f"the report {store.finished / 'block-00000.json'} is damaged"]
    assert not store.has_block(0)
    assert store.has_block(1)


def test_blocks_are_forgotten_from_one_on_and_the_checkpoint_is_no_longer_whole(store):
    put_blocks(store, 0, 1, 2)
    store.put_file("passthrough-00001", {"e": torch.zeros(2)}, {})
    store.place("block-00002").rename(store.output / "block-00002.safetensors")
    (store.output / "config.json").write_text("{}")
    store.reset_blocks(1)
    assert not store.is_complete
    assert [store.has_block(i) for i in range(3)] == [True, False, False]
    assert names(store.output) == [".run"]
    assert store.has_file("passthrough-00001")


def test_what_killed_writers_left_is_swept_when_the_run_continues(store):
    store.open({"a": 1}, "auto")
    put_blocks(store, 0)
    left = store.finished / ".block-00001.safetensors.0123.tmp"
    left.write_bytes(b"half")
    store.open({"a": 1}, "auto")
    assert not left.exists()
    assert store.has_block(0)


def test_a_damaged_run_file_is_named(store):
    store.open({"a": 1}, "auto")
    (store.root / "run.json").write_text('{"a"')
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        store.open({"a": 1}, "auto")


def test_what_an_earlier_call_could_not_finish_writing_is_no_foreign_directory(store):
    store.root.mkdir(parents=True)
    (store.root / ".run.json.1.tmp").write_text("{")
    assert not store.open({"a": 1}, "auto")
    with pytest.raises(ConfigError, match=r"differs in a \(1 then, 2 now\)"):
        store.open({"a": 2}, "auto")


def test_a_run_of_an_earlier_version_goes_on_where_nothing_differs_and_else_is_named_by_its_version(store):
    store.open({"recipe": "a"}, "auto")
    (store.root / "run.json").write_text('{"recipe": "a"}')  # as 0.1 wrote it
    assert store.open({"recipe": "a"}, "auto")
    with pytest.raises(ConfigError, match=r"another run of qe_dist 0\.1 \(this is .*\), which differs in recipe"):
        store.open({"recipe": "b"}, "auto")


def test_a_run_of_this_version_differs_by_its_settings_alone(store):
    store.open({"recipe": "a"}, "auto")
    with pytest.raises(ConfigError, match="belongs to another run, which differs in recipe"):
        store.open({"recipe": "b"}, "auto")
