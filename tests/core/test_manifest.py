"""A manifest is read as it was written, and what it lacks is said."""

import json
from dataclasses import replace
from typing import Any

import pytest

from qe_dist import __version__
from qe_dist.core.errors import CheckpointError
from qe_dist.core.manifest import FittedBlock, Manifest, TuningReport
from qe_dist.core.quantized import FitReport

GROUP = FitReport("int8", 0.25, {"text": 0.25}, None, {}, 0.5, 90, 80, {"a16": 1, "int8": 64}, 1.5, ("more damping",))
MADE = Manifest(
    recipe={"scheme": "w4a8"},
    run={"seed": 0},
    quantization_config="ab",
    files={"block-00000.safetensors": "cd"},
    tensors={"block-00000.safetensors": {"b.fc.weight_packed": "ef"}},
    padding=None,
    arithmetic="int8",
    bits_per_weight=4.5,
    active_bits_per_weight=4.25,
    macs_per_weight=1.0,
    macs_by_arithmetic={"a16": 0.0, "int8": 1.0},
    parameters=128,
    fallbacks={"b.fc": ["more damping"]},
    blocks=(FittedBlock(0, "b.", {"fc": GROUP}, recipe_from=0, device="cpu", threads=1),),
    checkpoint_bytes=1000,
)


@pytest.mark.parametrize("padding", [None, [640, 768]])
def test_it_is_read_as_it_was_written_but_for_seconds(padding: list[int] | None) -> None:
    made = replace(MADE, padding=padding)
    written = json.loads(json.dumps(made.to_json()))
    assert ("padding" in written) is (padding is not None)
    assert "seconds" not in written["blocks"][0]["groups"]["fc"]
    block = replace(MADE.blocks[0], groups={"fc": replace(GROUP, seconds=0.0)})
    assert Manifest.from_json(written) == replace(made, blocks=(block,))


@pytest.mark.parametrize("kept", ["tuned", "closed form"])
def test_a_tuned_block_says_how_it_went_and_another_one_nothing(kept: str) -> None:
    tuning = TuningReport(steps=50, step=45, loss=0.4, error=0.1, nonfinite=(3,), kept=kept)
    block = replace(MADE.blocks[0], groups={"fc": replace(GROUP, seconds=0.0)}, tuning=tuning)
    assert FittedBlock.from_json(json.loads(json.dumps(block.to_json()))) == block
    assert "tuning" not in MADE.blocks[0].to_json()


def test_a_block_is_read_from_its_report_which_has_more() -> None:
    report = MADE.blocks[0].to_json() | {"layout": {}, "fit_seconds": 2.0}
    assert FittedBlock.from_json(report).groups["fc"].macs == GROUP.macs


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "KeyError: 'blocks'"),
        ([], "TypeError"),
        (MADE.to_json() | {"blocks": [{"index": 0, "groups": {"fc": {"fallbacks": []}}}]}, "TypeError.*arithmetic"),
        ({k: v for k, v in MADE.to_json().items() if k != "arithmetic"}, "KeyError: 'arithmetic'"),
    ],
)
def test_what_is_missing_is_said_and_what_to_do(said: Any, told: str) -> None:
    """Without a version it is of the first one, and so one of the two is the reason; with this one it is damaged."""
    if isinstance(said, dict):
        said = {name: value for name, value in said.items() if name != "written_by"}
        with pytest.raises(CheckpointError, match=rf"it is damaged \({told}.*quantize the model again"):
            Manifest.from_json(said | {"written_by": __version__})
    with pytest.raises(CheckpointError, match=rf"or qe_dist 0.1 wrote it \({told}.*quantize the model again"):
        Manifest.from_json(said)


def test_a_manifest_of_the_first_version_is_read_where_it_has_all_that_is_needed() -> None:
    said = {name: value for name, value in MADE.to_json().items() if name != "written_by"}
    assert Manifest.from_json(said).written_by == "0.1"
