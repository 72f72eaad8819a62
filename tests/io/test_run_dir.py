"""Publishing: all of a file or nothing, and a message that says what to do."""

import resource
import signal

import pytest
import torch

from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError
from qe_dist.io.publish import publish_json, publish_tensors
from qe_dist.io.run_dir import RunDir


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 20 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("publish", "content"), [(publish_tensors, {"w": torch.zeros(100_000)}), (publish_json, "x" * 100_000)]
)
def test_a_full_disk_leaves_no_file_and_says_so(tmp_path, full_disk, publish, content):
    with pytest.raises(CheckpointError, match=r"block\.safetensors could not be written"):
        publish(tmp_path / "block.safetensors", content)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_publish_keeps_what_was_there(tmp_path, full_disk):
    path = tmp_path / "run.json"
    publish_json(path, {"a": 1})
    with pytest.raises(CheckpointError):
        publish_json(path, "x" * 100_000)
    assert path.read_text() == '{\n "a": 1\n}\n'


def batch(index: int) -> Batch:
    modality = torch.zeros(1, 3, dtype=torch.int8)
    return Batch(index, torch.randn(1, 3, 4), modality, torch.tensor([5]), {"cos": torch.ones(1, 3, 2)})


def test_a_batch_comes_back_as_it_went(tmp_path):
    store = RunDir(tmp_path)
    one = batch(3)
    store.put_batch(0, one)
    again = store.get_batch(0, 3)
    assert torch.equal(again.hidden, one.hidden)
    assert torch.equal(again.context["cos"], one.context["cos"])
    assert (again.index, again.sample_ids.tolist()) == (3, [5])


def test_a_damaged_batch_is_named(tmp_path):
    store = RunDir(tmp_path)
    store.put_batch(0, batch(0))
    path = next(tmp_path.rglob("batch-*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"batch-00000\.safetensors is damaged"):
        store.get_batch(0, 0)


def test_a_block_counts_as_finished_only_with_its_report(tmp_path):
    store = RunDir(tmp_path)
    publish_tensors(store.finished / f"{store.block_name(0)}.safetensors", {"w": torch.zeros(2)})
    assert not store.has_block(0)
    store.put_block(0, {"w": torch.zeros(2)}, {"index": 0})
    assert store.has_block(0)


def test_a_run_continues_at_the_last_complete_wave_before_the_first_unfinished_block(tmp_path):
    store = RunDir(tmp_path)
    assert (store.first_unfinished(4), store.last_spooled(0, num_batches=2)) == (0, 0)
    for block in (0, 1, 2):
        store.put_block(block, {"w": torch.zeros(2)}, {"index": block})
    for index in (0, 1):
        store.put_batch(2, batch(index))
    store.put_batch(3, batch(0))  # the wave behind it is not whole
    assert (store.first_unfinished(4), store.last_spooled(3, num_batches=2)) == (3, 2)
    store.put_block(3, {"w": torch.zeros(2)}, {"index": 3})
    assert store.first_unfinished(4) == 4
