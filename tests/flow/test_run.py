"""A run owns its directory: it is opened under its lock, continued by its identity, and mended."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qe_dist.core.errors import ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import opened, prepare_run
from qe_dist.flow.run import Run, with_policy
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig(tmp_path / "model", load_recipe("rtn-w4a8"), tmp_path / "data", tmp_path / "out")
    return Run(config, RunDir(config.output), {"recipe": config.recipe.describe(), "from_block": 0, "earlier": []})


def test_a_directory_is_claimed_continued_and_mended(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with run.lock:
        run.open()
        run.store.put_block(0, {"w": torch.zeros(2)}, {})
        run.store.put_block(1, {"w": torch.ones(2)}, {})
        run.store.place("block-00001").write_bytes(b"short")
        run.open()
    assert [run.store.has_block(index) for index in (0, 1)] == [True, False]
    assert "block-00001.safetensors is damaged" in caplog.text
    assert caplog.text.count("it is made anew") == 1


def test_another_identity_and_another_owner_are_refused(run: Run) -> None:
    with run.lock:
        run.open()
        with pytest.raises(ConfigError, match="belongs to another run, which differs in recipe"):
            Run(run.config, run.store, {**run.identity, "recipe": {}}).open()
        with pytest.raises(ConfigError), Run(run.config, run.store, run.identity).lock:
            raise AssertionError("two owners")


def test_earlier_recipes_are_those_of_the_directory(run: Run) -> None:
    later = replace(run.config, recipe=load_recipe("rtn-w4a6"), from_block=1)
    with pytest.raises(ConfigError, match="holds no run; a recipe can be changed"):
        with_policy(later, run.store)
    run.open()
    assert with_policy(later, run.store).earlier == ((0, run.recipe),)
    assert with_policy(run.config, run.store) is run.config
    with pytest.raises(ConfigError, match="from block 1 on the model would be rotated differently"):
        with_policy(replace(later, recipe=load_recipe("hadamard-w4a8")), run.store)


def test_what_is_complete_is_left_out_and_the_first_of_the_others_spools(tmp_path: Path) -> None:
    one = RunConfig(
        tiny_model(tmp_path / "model"), load_recipe("rtn-w4a8"), calibration(tmp_path / "data"), tmp_path / "1"
    )
    other = replace(one, recipe=load_recipe("rtn-w4a6"), output=tmp_path / "2")
    ready = prepare_run(one, other)
    assert ready.store is ready.runs[0].store
    with opened(ready):
        pass
    (one.output / "config.json").write_text("{}")
    with opened(prepare_run(one, other)) as (left, lease):
        assert [run.config for run in left.runs] == [left.config] == [other]
        assert left.store is left.runs[0].store
        lease.check()
    (other.output / "config.json").write_text("{}")
    with opened(prepare_run(one, other)) as (left, _):
        assert (left.runs, left.config, left.next_block()) == ((), one, None)


def test_nothing_is_rebuilt_from_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []
    init = RunDir.__init__
    monkeypatch.setattr(RunDir, "__init__", lambda self, output: made.append(output) or init(self, output))
    config = RunConfig(
        tiny_model(tmp_path / "m"), load_recipe("rtn-w4a8"), calibration(tmp_path / "d"), tmp_path / "out"
    )
    with opened(prepare_run(config)) as (ready, _):
        assert ready.next_block() == 0
    assert made == [config.output]
