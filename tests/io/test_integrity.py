"""A checkpoint is what its manifest lists, file by file and tensor by tensor."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qe_dist.core.errors import CheckpointError
from qe_dist.io.checkpoint import MANIFEST, read_manifest
from qe_dist.io.integrity import file_faults, settings_digest
from qe_dist.io.publish import digest, publish_tensors
from qe_dist.serve.format import check_files
from tests.core.test_manifest import MADE

FILE = "block-00000.safetensors"
TENSORS = {"codes": torch.arange(12, dtype=torch.int32), "scale": torch.ones(3, dtype=torch.bfloat16)}
SETTINGS = {"layouts": [{"qkv": ["int32", 12]}], "block_layouts": [0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as the manifest knows it."""
    whole = publish_tensors(tmp_path / FILE, TENSORS)
    each = {name: digest({name: tensor}) for name, tensor in TENSORS.items()}
    manifest = replace(MADE, files={FILE: whole}, tensors={FILE: each}, quantization_config=settings_digest(SETTINGS))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest.to_json()))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": SETTINGS}))
    return tmp_path


def test_what_was_written_has_no_fault(folder):
    assert file_faults(folder, read_manifest(folder)) == []
    check_files(folder)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({**TENSORS, "scale": torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)}, "scale is not as written"),
        ({**TENSORS, "codes": TENSORS["codes"].view(3, 4)}, "codes is not as written"),
        ({"codes": TENSORS["codes"]}, "scale is missing"),
        ({**TENSORS, "extra": torch.ones(1)}, "extra is not of this checkpoint"),
        (dict.fromkeys("abcd", TENSORS["codes"]), "codes is missing, scale is missing, a is not .*, 3 more"),
    ],
    ids=["one bit", "shape", "missing", "extra", "all else"],
)
def test_a_tensor_that_differs_is_named(folder: Path, tensors: dict[str, Tensor], said: str):
    publish_tensors(folder / FILE, tensors)
    with pytest.raises(CheckpointError, match=rf"is damaged: {FILE}: SHA-256 expected \w+, found \w+ \({said}"):
        check_files(folder)


def test_files_that_are_missing_cut_or_foreign_are_named(folder: Path):
    (folder / FILE).rename(folder / "model.safetensors")
    assert file_faults(folder, read_manifest(folder)) == [f"{FILE}: missing", "model.safetensors: not in the manifest"]
    (folder / FILE).write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    (folder / "model.safetensors").unlink()
    (fault,) = file_faults(folder, read_manifest(folder))
    assert "cannot be read" in fault


def test_settings_that_are_not_of_these_tensors_are_named(folder: Path):
    (folder / "config.json").write_text(json.dumps({"quantization_config": {**SETTINGS, "block_layouts": [1]}}))
    with pytest.raises(CheckpointError, match=r"config\.json: its quantization_config is not that of the manifest"):
        check_files(folder)


def test_the_rest_of_config_may_be_edited(folder: Path):
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS, "max_position_embeddings": 1}))
    check_files(folder)


def test_an_older_manifest_is_named_with_what_it_lacks(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["tensors"], manifest["written_by"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: .*or qe_dist 0.1 wrote it \(KeyError: 'tensors'\)"):
        check_files(folder)


@pytest.mark.parametrize("lost", [MANIFEST, FILE], ids=["manifest", "weights"])
def test_where_nothing_can_be_compared_a_warning_says_so(folder: Path, lost: str, caplog: pytest.LogCaptureFixture):
    (folder / lost).unlink()
    with caplog.at_level(logging.WARNING):
        check_files(folder)
    assert MANIFEST in caplog.text
