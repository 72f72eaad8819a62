"""Random models of any size are shaped and named like published ones, and activations stay finite in them."""

import sys

import pytest
import torch
from safetensors import safe_open

from qe_dist import archs
from qe_dist.data.samples import read_samples
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe
from tests.tiny import MODELS, TRAINING, calibration

sys.path.insert(0, str(TRAINING))
from synthetic import Shape, write_model

NARROW = Shape(hidden=64, intermediate=96, blocks=2, heads=4, vision_width=32, vision_heads=2)


def shapes(folder):
    source = SafetensorsSource(folder)
    return {name: source.shape(name) for name in source.names()}


def test_names_and_shapes_are_those_of_a_checkpoint_that_transformers_wrote(tmp_path):
    bundled = Shape(hidden=256, intermediate=640, blocks=6, heads=8, kv_heads=4)
    size = write_model(tmp_path, bundled)
    assert shapes(tmp_path) == shapes(MODELS / "plain")
    with safe_open(MODELS / "plain" / "model.safetensors", "pt") as file:
        assert size == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)


def test_every_block_has_a_shard_of_its_own(tmp_path):
    write_model(tmp_path, NARROW)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + NARROW.blocks


def test_activations_stay_finite_and_of_one_size_through_64_blocks(tmp_path):
    write_model(tmp_path / "model", Shape(**vars(NARROW) | {"blocks": 64}))
    run = RunConfig(tmp_path / "model", load_recipe("rtn-w4a16"), calibration(tmp_path / "data", 2), tmp_path / "out")
    source = SafetensorsSource(run.model)
    arch = archs.for_config(source.config)
    batch = Embedder(run, "qwen2_vl").embed(0, read_samples(run.calibration)[:8])
    before = batch.hidden.std()
    for spec in arch.spec(source).blocks:
        batch = batch.with_hidden(arch.run_block(arch.block(source, spec, run.device, run.dtype), batch, spec.index))
    assert 0.5 < batch.hidden.std() / before < 5


def test_a_block_is_the_same_in_a_deeper_model_but_for_the_scale_of_what_it_writes(tmp_path):
    write_model(tmp_path / "shallow", NARROW)
    write_model(tmp_path / "deep", Shape(**vars(NARROW) | {"blocks": 8}))
    shallow, deep = SafetensorsSource(tmp_path / "shallow"), SafetensorsSource(tmp_path / "deep")
    for name in shallow.names():
        scale = 2 if name.endswith(("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight")) else 1
        if "layers.1." not in name:
            torch.testing.assert_close(deep.get(name) * scale, shallow.get(name), rtol=0.01, atol=0)


@pytest.mark.parametrize(("change", "said"), [({"vocab": 100}, "512 tokens"), ({"heads": 8}, "multiple of 16")])
def test_impossible_sizes_are_refused(tmp_path, change, said):
    with pytest.raises(SystemExit, match=said):
        write_model(tmp_path / "model", Shape(**vars(NARROW) | change))
    assert not (tmp_path / "model" / "config.json").exists()
