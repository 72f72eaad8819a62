"""A model in object storage, a mirror of the run, and disks that do not last: the bytes of a run on one disk."""

import shutil
from dataclasses import replace

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.flow.stage import Stage
from qe_dist.io.bucket import Bucket
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("storage")
    model, data = tiny_model(root / "model"), calibration(root / "data", 3)
    recipe = load_recipe("qe-w4a6")
    one = RunConfig(model, recipe, data, root / "local", samples_per_batch=2, sample_tokens=128, blocks_per_worker=1)
    local.quantize(one)
    return one


@pytest.fixture
def url(run, tmp_path, monkeypatch):
    """Of a copy of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"file://{shutil.copytree(run.model, tmp_path / 'bucket' / 'model')}"


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_run_from_a_url_with_a_mirror_gives_the_same_bytes_in_both_places(run, url, tmp_path):
    one = replace(run, model=url, output=tmp_path / "out", mirror=f"file://{tmp_path}/bucket/mirror")
    local.quantize(one)
    assert files(one.output) == files(run.output)
    assert files(tmp_path / "bucket" / "mirror") == files(run.output)


def test_a_machine_that_comes_up_with_an_empty_disk_fits_no_block_again(run, tmp_path, monkeypatch):
    mirror = tmp_path / "bucket" / "mirror"
    one = replace(run, output=tmp_path / "lost", mirror=f"file://{mirror}")
    fitted, fit = [], Stage.fit

    def fit_until_block_1(stage, index):
        if index == 1:
            raise ConnectionError("the machine is taken away")
        fitted.append(index)
        return fit(stage, index)

    monkeypatch.setattr(Stage, "fit", fit_until_block_1)
    with pytest.raises(ConnectionError):
        local.quantize(one)
    assert not (mirror / "config.json").exists()
    shutil.rmtree(one.output)

    monkeypatch.setattr(Stage, "fit", lambda stage, index: (fitted.append(index), fit(stage, index)))
    finished = [p.stat().st_mtime_ns for p in mirror.glob("block-*")]
    again = replace(one, output=tmp_path / "new", resume="required")
    local.quantize(again)
    assert files(again.output) == files(mirror) == files(run.output)
    assert [p.stat().st_mtime_ns for p in mirror.glob("block-00000*")] == finished

    shutil.rmtree(again.output)
    local.quantize(again)  # a finished one comes back whole
    assert files(again.output) == files(mirror) == files(run.output)
    assert (len(finished), fitted.count(1)) == (1, 1)


def test_a_mirror_of_another_recipe_is_refused_before_any_work(run, tmp_path):
    mirror = f"file://{tmp_path}/mirror"
    there = Bucket(mirror)
    there.put(run.output / ".run" / "run.json", ".run/run.json")
    other = replace(run, recipe=load_recipe("rtn-w4a6"), output=tmp_path / "out", mirror=mirror)
    with pytest.raises(ConfigError, match=f"{mirror} belongs to another run, which differs in recipe"):
        local.quantize(other)


def test_recipes_of_one_pass_need_a_mirror_each(run, tmp_path):
    one = replace(run, output=tmp_path / "a", mirror=f"file://{tmp_path}/mirror")
    with pytest.raises(ConfigError, match="a mirror of its own"):
        local.quantize(one, replace(one, output=tmp_path / "b"))
