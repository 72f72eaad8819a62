"""A model behind a URL is the model on disk; what travels is what is asked for."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io import bucket, files
from qe_dist.io.bucket import Bucket
from qe_dist.io.weights import SafetensorsSource
from tests.s3 import forget_connections

KIB = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(bucket, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(files, "REQUEST_BYTES", 256 * KIB)
    monkeypatch.setattr(files, "AHEAD_BYTES", 4096 * KIB)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """Two shards: eight large tensors, and a large one between two small ones."""
    folder, draw = tmp_path / "model", torch.Generator().manual_seed(0)
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {f"layer.{i}": torch.randn(640, 384, generator=draw) for i in range(8)},
        "model-00002-of-00002.safetensors": {
            "bias": torch.randn(7, generator=draw).bfloat16(),
            "head": torch.randn(333, 501, generator=draw).bfloat16(),
            "norm": torch.randn(5, generator=draw).bfloat16(),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def url(model, storage):
    """Where a copy of the model lies."""
    return uploaded(model, storage)


def uploaded(folder, url):
    there = Bucket(url)
    for path in folder.iterdir():
        there.put(path, path.name)
    return url


def test_a_remote_model_is_the_local_one(model, url, same):
    local, remote = SafetensorsSource(model), SafetensorsSource(url)
    names = sorted(local.names())
    assert (sorted(remote.names()), remote.config) == (names, local.config)
    assert {n: remote.shape(n) for n in names} == {n: local.shape(n) for n in names}
    assert same({n: remote.get(n) for n in names}, {n: local.get(n) for n in names})
    assert remote.fingerprint() == local.fingerprint()
    assert sorted(p.name for p in remote.folder.iterdir()) == ["LICENSE", "config.json", "model.safetensors.index.json"]


def test_what_is_read_ahead_is_what_would_be_read(model, url, same):
    local, remote = SafetensorsSource(model), SafetensorsSource(url)
    names = sorted(local.names())
    remote.prefetch(names)
    order = [*reversed(names), *names]  # not as it was read, and twice
    assert same([remote.get(n) for n in order], [local.get(n) for n in order])


def test_a_model_that_was_changed_in_its_place_is_another_one(model, url):
    before = SafetensorsSource(url)
    (model / "config.json").write_text('{"model_type": "other"}')
    after = SafetensorsSource(uploaded(model, url))
    assert after.config == {"model_type": "other"}
    assert before.fingerprint() != after.fingerprint()


def test_a_missing_shard_is_named(model, url):
    Bucket(url).remove("model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=rf"{url}/model-00002-of-00002.safetensors is missing"):
        SafetensorsSource(url)


def test_a_truncated_shard_is_named(model, url):
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{url}/{shard.name} cannot be read .* may be truncated"):
        SafetensorsSource(uploaded(model, url))


def test_a_shard_that_shrinks_while_it_is_used_is_named(model, url):
    source = SafetensorsSource(url)
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    uploaded(model, url)
    with pytest.raises(CheckpointError, match=rf"{url}/{shard.name} ended early"):
        source.get("layer.7")


def test_a_place_without_a_model_is_named(url):
    with pytest.raises(ConfigError, match=rf"{url}/nowhere/config.json does not exist"):
        SafetensorsSource(f"{url}/nowhere")


def test_an_unknown_protocol_is_named():
    with pytest.raises(ConfigError, match="ftq://x/y is no address of a storage"):
        SafetensorsSource("ftq://x/y")


# -- what travels over the real protocol


def test_opening_reads_headers_only(model, s3):
    uploaded(model, "s3://models/m")
    s3.reset()
    SafetensorsSource("s3://models/m")
    assert s3.bytes_out < 2 * files.KEPT_BYTES + 16 * KIB
    s3.reset()
    SafetensorsSource("s3://models/m")
    assert [g for g in s3.gets if g.endswith((".json", "LICENSE"))] == []  # in the cache folder since


def test_neighbours_come_in_few_requests_and_every_byte_once(model, s3):
    source = SafetensorsSource(uploaded(model, "s3://models/m"))
    names = [f"layer.{i}" for i in range(4)]
    size = sum(4 * math.prod(source.shape(n)) for n in names)
    s3.reset()
    source.prefetch(names)
    for name in names:
        source.get(name)
    assert s3.bytes_out == size
    assert len(s3.gets) <= math.ceil(size / files.REQUEST_BYTES) + 2  # read in two groups


def test_small_tensors_travel_once(model, s3):
    source = SafetensorsSource(uploaded(model, "s3://models/m"))
    s3.reset()
    for _ in range(3):
        source.get("norm")
    assert len(s3.gets) == 1


def all_read(source):
    """Returns when the thread that reads ahead has nothing left to do."""
    source._files._reader.submit(int).result()


def test_read_ahead_stays_within_its_bound_and_goes_on_as_tensors_are_taken(model, s3, monkeypatch):
    source = SafetensorsSource(uploaded(model, "s3://models/m"))
    names, size = [f"layer.{i}" for i in range(8)], 4 * 640 * 384
    monkeypatch.setattr(files, "REQUEST_BYTES", size // 8)
    monkeypatch.setattr(files, "AHEAD_BYTES", 3 * size)
    s3.reset()
    source.prefetch(names)
    all_read(source)
    assert s3.bytes_out == 3 * size
    source.get(names[0])
    all_read(source)
    assert s3.bytes_out == 4 * size
    for name in names[1:]:
        source.get(name)
    assert s3.bytes_out == 8 * size


def test_a_connection_that_breaks_is_tried_again(model, s3, same):
    source = SafetensorsSource(uploaded(model, "s3://models/m"))
    s3.faults = 2
    assert same(source.get("head"), SafetensorsSource(model).get("head"))
    assert s3.faults == 0


def test_a_missing_bucket_is_named(s3, tmp_path):
    with pytest.raises(ConfigError, match=r"s3://ghost/m/config\.json does not exist"):
        SafetensorsSource("s3://ghost/m")
    (tmp_path / "a").write_text("a")
    with pytest.raises(CheckpointError, match=r"s3://ghost/m/a could not be written: .*; is there such a bucket"):
        Bucket("s3://ghost/m").put(tmp_path / "a", "a")


def test_missing_credentials_are_said(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    forget_connections()
    with pytest.raises(CheckpointError, match=r"s3://models/m/ cannot be reached: .*credentials"):
        SafetensorsSource("s3://models/m")
    forget_connections()


def test_a_model_that_was_fetched_once_is_not_trusted_blindly(model, s3):
    """The cache folder is found by what the storage says of the files, not by the URL."""
    first = SafetensorsSource(uploaded(model, "s3://models/m")).folder
    assert SafetensorsSource("s3://models/m").folder == first
    shutil.rmtree(first)
    assert SafetensorsSource("s3://models/m").config == {"model_type": "qwen2_vl"}
