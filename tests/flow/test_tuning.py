"""Blocks tuned in order, each on what the quantized blocks before it make: in waves, beside others, and interrupted."""

import contextlib
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from qe_dist import archs
from qe_dist.core.batch import joined
from qe_dist.core.errors import ConfigError
from qe_dist.flow import tuning as flow_tuning
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run, quantize
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.tuning.tune import Tune
from qe_dist.serve.blocks import open_blocks
from tests.tiny import calibration, tiny_model, with_blocks

BLOCKS, SAMPLES = 3, 16


def tuned(name, steps=12):
    return replace(load_recipe(name), tuning=Tune(steps=steps, batch=4, checks=3, rate=0.5))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuned")
    model, data = tiny_model(root / "model", config=with_blocks(BLOCKS)), calibration(root / "data", SAMPLES)
    recipe = tuned("qera+tune-w2a16g16@1f4")
    return RunConfig(model, recipe, data, root / "out", samples_per_batch=3, sample_tokens=64)


@pytest.fixture(scope="module")
def expected(run):
    quantize(run)
    return files(run)


LONG = tuned("qera+tune-w2a16g16@1f4", steps=150)


@pytest.fixture(scope="module")
def long(run):
    """Of a run that takes long enough to be killed in the middle of a block."""
    one = replace(run, recipe=LONG, output=run.output.with_name("long"))
    quantize(one)
    return files(one)


@pytest.fixture
def seen(monkeypatch):
    """The problem of every block that is tuned."""
    problems, tune = [], Tune.tune
    monkeypatch.setattr(Tune, "tune", lambda self, block: (problems.append(block), tune(self, block))[1])
    return problems


def files(run):
    return {p.name: p.read_bytes() for p in sorted(run.output.iterdir()) if p.is_file()}


def test_every_block_is_tuned_and_says_how_it_went(run, expected):
    manifest = read_manifest(run.output)
    assert manifest.recipe["tuning"]["steps"] == 12
    assert all(block.tuning.steps == 12 for block in manifest.blocks)
    better = [block for block in manifest.blocks if block.tuning.kept == "tuned"]
    assert better
    assert all(0 < block.tuning.loss < 1 and block.tuning.step > 0 for block in better)
    assert not (run.output / ".run" / "quantized").exists(), "what only a continuation needs is left"


def test_waves_give_the_same_bytes_and_keep_the_inputs_of_one_block(run, expected, tmp_path, monkeypatch):
    one, kept = replace(run, output=tmp_path / "waves", blocks_per_worker=1), []
    put_block = RunDir.put_block

    def looking(store, *args):
        kept.append(sorted(f"{p.parent.name}/{p.name}" for p in store.root.glob("*/block-*") if p.is_dir()))
        put_block(store, *args)

    monkeypatch.setattr(RunDir, "put_block", looking)
    quantize(one)
    assert files(one) == expected
    assert kept[1] == [
        *(f"activations/block-0000{i}" for i in range(3)),  # of the wave before, of this one and of the next one
        *(f"quantized/block-0000{i}" for i in (1, 2)),
    ]


def test_within_a_wave_inputs_are_kept_of_its_first_block_and_of_two_others(run, expected, tmp_path, monkeypatch):
    """The wave is streamed again from its first block if a worker is lost."""
    one, kept, put_block = replace(run, output=tmp_path / "kept"), [], RunDir.put_block

    def looking(store, *args):
        kept.append({p.name for p in store.root.glob("activations/block-*")})
        put_block(store, *args)

    monkeypatch.setattr(RunDir, "put_block", looking)
    quantize(one)
    assert files(one) == expected
    assert kept[2] == {"block-00000", "block-00002"}


def test_a_block_is_tuned_on_what_the_published_block_before_it_computes(run, tmp_path, seen, monkeypatch):
    """Bit for bit as a checkpoint runs, and against what the full-precision blocks compute."""
    one, entered, put_batch = replace(run, output=tmp_path / "entered"), {}, RunDir.put_batch

    def keeping(store, block, batch, kind="activations"):
        entered[kind, block, batch.index] = batch
        put_batch(store, block, batch, kind)

    monkeypatch.setattr(RunDir, "put_batch", keeping)
    quantize(one)
    arch = archs.get("qwen2_vl")
    _, quantized = open_blocks(one.output, arch, "cpu", torch.float32)
    _, exact = open_blocks(one.model, arch, "cpu", torch.float32)
    batches = range(len({index for _, _, index in entered}))
    for kind, blocks in (("quantized", quantized), ("activations", exact)):
        flow = [entered["activations", 0, i] for i in batches]
        for block in range(BLOCKS - 1):
            run_block = blocks[block]()
            flow = [batch.with_hidden(run_block(batch)) for batch in flow]
            assert all(torch.equal(b.hidden, entered[kind, block + 1, b.index].hidden) for b in flow)
            if kind == "activations":
                assert torch.equal(seen[block].targets, joined(flow).hidden)
    held = seen[0].held_out
    assert held.sum() == 1
    assert len(held) == SAMPLES


def test_interrupted_anywhere_it_continues_with_the_block_that_is_missing(run, expected, tmp_path, seen, monkeypatch):
    for number, (name, place) in enumerate([("put_block", 1), ("put_batch", 20), ("put_batch", 27)]):
        one = replace(run, output=tmp_path / str(number))
        calls, original = [], getattr(RunDir, name)

        def failing(store, *args, calls=calls, place=place, original=original):
            calls.append(1)
            if len(calls) == place + 1:
                raise KeyboardInterrupt
            return original(store, *args)

        monkeypatch.setattr(RunDir, name, failing)
        with pytest.raises(KeyboardInterrupt):
            quantize(one)
        monkeypatch.setattr(RunDir, name, original)
        done = sum(RunDir(one.output).has_block(i) for i in range(BLOCKS))
        assert done < BLOCKS
        seen.clear()
        quantize(one)
        assert files(one) == expected
        assert len(seen) == BLOCKS - done, "a finished block was tuned again"


def test_a_damaged_block_alone_is_made_anew_from_those_before_it(run, expected, tmp_path, seen, monkeypatch):
    one = replace(run, output=tmp_path / "damaged")
    put_block = RunDir.put_block

    def last_fails(store, index, *args):
        if index == BLOCKS - 1:
            raise KeyboardInterrupt
        put_block(store, index, *args)

    monkeypatch.setattr(RunDir, "put_block", last_fails)
    with pytest.raises(KeyboardInterrupt):
        quantize(one)
    monkeypatch.setattr(RunDir, "put_block", put_block)
    store = RunDir(one.output)
    path = store.place(store.block_name(1))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    seen.clear()
    quantize(one)
    assert len(seen) == 2
    assert files(one) == expected


KILLED = """
import pickle, sys
import qe_dist.flow.tuning as tuning
from qe_dist.flow.local import quantize
tuning.SAVE_SECONDS, tuning.SAVE_SHARE = 0.0, 1.0
quantize(pickle.loads(bytes.fromhex(sys.argv[1])))
"""


def saves(run, block):
    """When the training of a block, or of every block, was saved."""
    found = {}
    for path in RunDir(run.output).trainings.glob(f"block-{block}.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # its block was published in this moment
            found[path.name] = path.stat().st_mtime_ns
    return set(found.items())


def kill_while_tuning(run, delay, block="*"):
    """A process that tunes, killed so long after it has saved a training anew."""
    before, process = saves(run, block), subprocess.Popen([sys.executable, "-c", KILLED, pickle.dumps(run).hex()])
    deadline = time.monotonic() + 120
    while saves(run, block) <= before:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()


def begun_at(monkeypatch):
    """The step at which the tuning of each block begins."""
    steps, tune = [], Tune.tune

    def looking(self, block):
        steps.append(0 if block.training is None else block.training.step)
        return tune(self, block)

    monkeypatch.setattr(Tune, "tune", looking)
    return steps


def test_a_run_that_is_killed_within_a_block_goes_on_within_it(run, long, tmp_path, monkeypatch):
    one = replace(run, recipe=LONG, output=tmp_path / "killed")
    kill_while_tuning(one, 0.05, "00001")
    assert [RunDir(one.output).has_block(i) for i in range(BLOCKS)] == [True, False, False]
    steps = begun_at(monkeypatch)
    quantize(one)
    assert steps[0] > 0
    assert steps[1:] == [0]
    assert files(one) == long


@pytest.mark.nightly
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(run, long, tmp_path):
    one, moments, done = replace(run, recipe=LONG, output=tmp_path / "killed"), random.Random(18), set()
    for _ in range(10):
        kill_while_tuning(one, moments.uniform(0, 0.3))
        done.add(sum(RunDir(one.output).has_block(i) for i in range(BLOCKS)))
    assert len(done) > 1, "no block was finished between the kills"
    quantize(one)
    assert files(one) == long


def test_a_damaged_training_is_removed_and_the_block_tuned_from_its_start(run, expected, tmp_path, monkeypatch, caplog):
    one, put_training = replace(run, output=tmp_path / "damaged"), RunDir.put_training
    monkeypatch.setattr(flow_tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(flow_tuning, "SAVE_SHARE", float("inf"))

    def once(store, block, tensors):
        put_training(store, block, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "put_training", once)
    with pytest.raises(KeyboardInterrupt):
        quantize(one)
    monkeypatch.setattr(RunDir, "put_training", put_training)
    path = RunDir(one.output).trainings / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    steps = begun_at(monkeypatch)
    quantize(one)
    assert steps == [0, 0, 0]
    assert "it is removed, and the block is tuned from its start" in caplog.text
    assert files(one) == expected
    assert not RunDir(one.output).trainings.exists()


@pytest.mark.nightly
def test_runs_that_tune_and_runs_that_do_not_share_a_pass(run, expected, tmp_path):
    others = [
        replace(run, output=tmp_path / "int8", recipe=tuned("rtn+tune-w4a8g16")),
        replace(run, output=tmp_path / "plain", recipe=load_recipe("gptq-w4a8")),
    ]
    together = [replace(run, output=tmp_path / "together"), *others]
    quantize(*together)
    assert files(together[0]) == expected
    for one in others:
        alone = replace(one, output=tmp_path / f"{one.output.name} alone")
        quantize(alone)
        assert files(alone) == files(one)


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(run, tmp_path):
    few = replace(run, calibration=calibration(tmp_path / "few", SAMPLES - 1), output=tmp_path / "no")
    with pytest.raises(ConfigError, match=r"has 15 samples, and tune needs 16 at least.*add samples"):
        prepare_run(few)
    quantize(replace(run, recipe=load_recipe("rtn-w4a8"), output=tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"a recipe with tune is for all blocks.*leave out --from-block"):
        prepare_run(replace(run, output=tmp_path / "plain", from_block=1))
    deep = replace(run, model=tiny_model(tmp_path / "deep", arch="qwen3_vl"), output=tmp_path / "no")
    with pytest.raises(ConfigError, match="blocks of qwen3_vl read more than rotary tables"):
        prepare_run(deep)
    assert not few.output.exists()


def test_too_few_tokens_are_said_with_the_number_that_would_do(run, tmp_path):
    assert not any("tune" in note for note in prepare_run(run).notes)
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(f'{{"text": "{i}"}}' for i in range(SAMPLES)))
    config = with_blocks(1)
    wide = config | {"text_config": config["text_config"] | {"intermediate_size": 1024}}
    ready = prepare_run(replace(run, model=tiny_model(tmp_path / "wide", config=wide), calibration=short))
    most = len(ready.samples) * ready.calibration.tokens
    assert ready.notes == (
        f"tune learns 208896 roundings of a block from {most} tokens at most; with fewer than 3264 there are more of "
        "them than outputs to learn from",
    )
