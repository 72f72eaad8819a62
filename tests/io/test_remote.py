"""A mirror has what is finished, and gives it back to an empty disk."""

import os
from pathlib import Path

import pytest
import torch

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.bucket import Bucket
from qe_dist.io.publish import publish_json
from qe_dist.io.remote import Mirror
from qe_dist.io.run_dir import RunDir

IDENTITY = {"model": "m", "recipe": {"name": "r"}}


def opened(output: Path, url: str, identity=IDENTITY, resume="auto") -> tuple[RunDir, Mirror]:
    """As the engine does."""
    store = RunDir(output)
    mirror = Mirror(url, store)
    mirror.restore(identity, resume)
    store.open(identity, resume)
    return store, mirror


def finished_run(output: Path, url: str, complete: bool = False) -> RunDir:
    """Two blocks and what is passed through; `complete` moves them as `assemble` does."""
    store, mirror = opened(output, url)
    with mirror:
        for name in ("passthrough-00001", "block-00000", "block-00001"):
            store.put_file(name, {f"{name}.w": torch.full((9,), float(len(name)))}, {"index": 0})
            mirror.sync()
        mirror.flush()
        if complete:
            for path in list(store.finished.glob("*.safetensors")):
                os.replace(path, output / path.name)
            for name in ("model.safetensors.index.json", "qe_manifest.json", "config.json"):
                publish_json(output / name, {"is": name})
            mirror.sync()
    return store


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(url: str) -> set[str]:
    there = Bucket(url)
    return {*(f"{folder}/{name}".lstrip("/") for folder in ("", ".run", ".run/blocks") for name in there.files(folder))}


def test_an_empty_disk_gets_back_what_is_finished(tmp_path, storage):
    lost = finished_run(tmp_path / "lost", storage)
    store, _ = opened(tmp_path / "new", storage)
    assert tree(store.output) == tree(lost.output)
    assert store.check_files() == []


def test_a_finished_mirror_is_the_checkpoint(tmp_path, storage):
    done = finished_run(tmp_path / "done", storage, complete=True)
    assert names(storage) == set(tree(done.output))


def test_a_checkpoint_there_says_so_only_while_it_is_one_here(tmp_path, storage):
    finished_run(tmp_path / "done", storage, complete=True)
    store, mirror = opened(tmp_path / "new", storage)
    assert [store.has_block(i) for i in range(2)] == [True, True]
    with mirror:
        mirror.sync()
    assert "config.json" not in names(storage)


def test_a_block_that_is_only_here_or_only_there_is_in_both_places_afterwards(tmp_path, storage):
    store = finished_run(tmp_path / "run", storage)
    store.forget_file("block-00001")
    store.put_file("block-00002", {"w": torch.ones(3)}, {"index": 2})
    store, mirror = opened(store.output, storage)
    with mirror:
        mirror.sync()
    assert {n for n in names(storage) if n.startswith("block")} == {f"block-0000{i}.safetensors" for i in range(3)}
    assert [store.has_block(i) for i in range(3)] == [True] * 3


def test_a_block_that_was_made_anew_replaces_the_one_there(tmp_path, storage):
    store = finished_run(tmp_path / "run", storage)
    store.put_file("block-00001", {"block-00001.w": torch.zeros(9)}, {"index": 0})
    _, mirror = opened(store.output, storage)
    with mirror:
        mirror.sync()
    again, _ = opened(tmp_path / "new", storage)
    assert tree(again.output) == tree(store.output)


def test_what_is_forgotten_here_is_removed_there(tmp_path, storage):
    store = finished_run(tmp_path / "run", storage, complete=True)
    store, mirror = opened(store.output, storage)
    with mirror:
        store.reset_blocks(1)
        mirror.sync()
    assert {n for n in names(storage) if "block-" in n} == {"block-00000.safetensors", ".run/blocks/block-00000.json"}
    assert "config.json" not in names(storage)


def test_a_damaged_block_there_is_made_anew(tmp_path, storage, caplog):
    finished_run(tmp_path / "lost", storage)
    (tmp_path / "bad").write_bytes(b"garbage")
    Bucket(storage).put(tmp_path / "bad", "block-00001.safetensors")
    store, _ = opened(tmp_path / "new", storage)
    assert (store.has_block(0), store.has_block(1)) == (True, False)
    assert f"{storage}/block-00001.safetensors is damaged" in caplog.text
    assert "block-00001.safetensors" not in tree(store.finished)


def test_another_run_is_refused_and_leaves_the_disk_empty(tmp_path, storage):
    finished_run(tmp_path / "run", storage)
    with pytest.raises(
        ConfigError, match=r"belongs to another run, which differs in recipe\.name \('r' then, 's' now\)"
    ):
        opened(tmp_path / "new", storage, IDENTITY | {"recipe": {"name": "s"}})
    assert not (tmp_path / "new").exists()


def test_a_mirror_obeys_resume(tmp_path, storage):
    with pytest.raises(ConfigError, match="holds no run to continue"):
        opened(tmp_path / "run", storage, resume="required")
    finished_run(tmp_path / "run", storage)
    with pytest.raises(ConfigError, match=f"{storage} holds a run already"):
        opened(tmp_path / "new", storage, resume="never")
    store, _ = opened(tmp_path / "new", storage, resume="required")
    assert store.has_block(1)


def test_a_place_of_others_is_refused(tmp_path, storage):
    (tmp_path / "thesis.tex").write_text("years of work")
    Bucket(storage).put(tmp_path / "thesis.tex", "thesis.tex")
    with pytest.raises(ConfigError, match=f"{storage} is not empty and holds no run of ours"):
        opened(tmp_path / "run", storage)


def test_a_connection_that_breaks_is_tried_again(tmp_path, s3):
    _, mirror = opened(tmp_path / "run", "s3://models/m")
    with mirror:
        s3.faults = 2
        mirror.sync()
    assert "run.json" in Bucket("s3://models/m").files(".run")


def test_a_mirror_that_cannot_be_written_is_noticed_at_once(tmp_path, s3):
    _, mirror = opened(tmp_path / "run", "s3://ghost/m")
    with pytest.raises(CheckpointError, match=r"s3://ghost/m/\.run/run\.json could not be written"), mirror:
        mirror.sync()


def test_a_mirror_that_fails_later_ends_the_run_and_nothing_here_is_lost(tmp_path, s3):
    store, mirror = opened(tmp_path / "run", "s3://models/m")
    mirror.sync()
    s3.remove_bucket()
    store.put_file("block-00000", {"w": torch.ones(3)}, {"index": 0})
    mirror.sync()
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors could not be written"):
        mirror.flush()
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors could not be written"):
        mirror.sync()
    assert store.has_block(0)
    assert store.check_files() == []


def test_what_is_on_its_way_arrives_after_an_error_too(tmp_path, storage):
    store, mirror = opened(tmp_path / "run", storage)
    store.put_file("block-00000", {"w": torch.ones(3)}, {"index": 0})
    with pytest.raises(KeyboardInterrupt), mirror:
        interrupted(mirror)
    assert ".run/blocks/block-00000.json" in names(storage)


def interrupted(mirror):
    mirror.sync()
    raise KeyboardInterrupt
