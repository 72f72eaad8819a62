"""The last step is renames and an index; what is passed through never lies in memory whole."""

import json
import weakref
from dataclasses import replace

import pytest
import torch

from qe_dist import archs
from qe_dist.core.errors import CheckpointError
from qe_dist.core.quantized import FitReport
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io import checkpoint
from qe_dist.io.checkpoint import INDEX, assemble, passthrough_parts, put_passthrough, read_manifest
from qe_dist.io.publish import sha256
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model
from tests.tiny import calibration, tiny_model

LIMIT = 40_000
"""Bytes of a part here; the embeddings and the head of the tiny model are larger, all other tensors smaller."""


class Watched(SafetensorsSource):
    """Remembers which tensors were alive at the same time."""

    def __init__(self, folder):
        super().__init__(folder)
        self.alive, self.together = {}, []

    def get(self, name):
        tensor = super().get(name).clone()
        self.alive[name] = weakref.ref(tensor)
        self.together.append({n for n, t in self.alive.items() if t() is not None})
        return tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def source(model):
    return Watched(model)


@pytest.fixture
def spec(source):
    return archs.for_config(source.config).spec(source)


@pytest.fixture
def run(model, tmp_path):
    data = calibration(tmp_path / "data")
    return RunConfig(model, load_recipe("rtn-w4a8"), data, tmp_path / "out", samples_per_batch=3, sample_tokens=64)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", LIMIT)


def test_parts_hold_every_tensor_once_and_are_small_or_one_tensor(source, spec, small_parts):
    parts = passthrough_parts(spec, source)
    assert list(parts) == [f"passthrough-{i:05d}" for i in range(1, len(parts) + 1)]
    assert len(parts) > 3
    assert [name for part in parts.values() for name in part] == list(spec.passthrough)
    for part in parts.values():
        assert len(part) == 1 or sum(4 * source.get(name).numel() for name in part) <= LIMIT


def test_no_more_than_one_part_is_in_memory(source, spec, small_parts, tmp_path):
    put_passthrough(RunDir(tmp_path), spec, source)
    parts = [set(part) for part in passthrough_parts(spec, source).values()]
    assert max(len(part) for part in parts) > 1
    for together in source.together:
        assert any(together <= part for part in parts)


def test_parts_that_are_there_are_not_written_again(source, spec, small_parts, tmp_path):
    store = RunDir(tmp_path)
    put_passthrough(store, spec, source)
    parts = passthrough_parts(spec, source)
    before = {name: store.place(name).stat().st_mtime_ns for name in parts}
    store.forget_file("passthrough-00002")
    source.together.clear()
    put_passthrough(store, spec, source)
    assert set().union(*source.together) == set(parts.pop("passthrough-00002"))
    assert all(store.place(name).stat().st_mtime_ns == before[name] for name in parts)


def test_a_checkpoint_in_many_parts_loads_as_one_in_few(run, tmp_path, monkeypatch):
    quantize(run)
    monkeypatch.setattr(checkpoint, "PART_BYTES", LIMIT)
    many = replace(run, output=tmp_path / "many")
    quantize(many)
    few = {p.name for p in run.output.glob("passthrough-*")}
    assert len(few) == 1 < len(list(many.output.glob("passthrough-*")))
    ids = torch.arange(7, 20)[None]
    one, other = (load_model(r.output)(input_ids=ids).logits for r in (run, many))
    assert torch.equal(one, other)
    manifest = read_manifest(many.output)
    assert set(manifest.files) == {p.name for p in many.output.glob("*.safetensors")}
    assert all(sha256(many.output / name) == digest for name, digest in manifest.files.items())
    assert set(json.loads((many.output / INDEX).read_text())["weight_map"].values()) == set(manifest.files)


GROUP = FitReport("int8", None, {}, None, {}, None, 1, 1, {"int8": 1, "a16": 0}, seconds=0.0)


def finished(store, spec, source):
    """All that assemble needs, with hardly a weight in it."""
    for block in spec.blocks:
        report = {"index": block.index, "groups": {"g": GROUP.to_json()}, "fallbacks": {}, "layout": {}}
        report |= {"recipe_from": 0, "device": "cpu", "threads": 1}
        store.put_block(block.index, {f"{block.prefix}w": torch.zeros(2)}, report)
    put_passthrough(store, spec, source)


def test_the_last_step_reads_no_weight_whatever_the_size(source, spec, tmp_path):
    """A terabyte that is not really there would take an hour to read."""
    store, terabyte = RunDir(tmp_path), 2**40
    finished(store, spec, source)
    report = store.block_report(0)
    (store.finished / "block-00000.json").write_text(json.dumps(report | {"bytes": terabyte}))
    with store.place("block-00000").open("r+b") as file:
        file.truncate(terabyte)
    assemble(store, spec, source, {"scheme": "w4a8"}, {})
    assert (tmp_path / "block-00000.safetensors").stat().st_size == terabyte
    assert read_manifest(tmp_path).files["block-00000.safetensors"] == report["sha256"]


def test_an_interrupted_last_step_is_done_again(source, spec, tmp_path, monkeypatch):
    store = RunDir(tmp_path)
    finished(store, spec, source)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "publish_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            assemble(store, spec, source, {"scheme": "w4a8"}, {})
    assert not store.is_complete
    assert store.check_files() == []
    assemble(store, spec, source, {"scheme": "w4a8"}, {})
    assert store.is_complete


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda p: p.unlink(), "is missing"), (lambda p: p.write_bytes(b"short"), r"has 5 bytes, expected \d+")],
)
def test_a_file_that_is_missing_or_cut_stops_the_last_step_and_is_forgotten(source, spec, tmp_path, damage, said):
    store = RunDir(tmp_path)
    finished(store, spec, source)
    damage(store.place("block-00001"))
    with pytest.raises(CheckpointError, match=rf"block-00001\.safetensors {said}.*Type the same command again"):
        assemble(store, spec, source, {"scheme": "w4a8"}, {})
    assert not store.is_complete
    assert [store.has_block(i) for i in (0, 1)] == [True, False]
