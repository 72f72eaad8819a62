"""What `qe-dist status` and the view of the command say of a run that works, ended, was killed or lost a worker."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from qe_pipelines import main
from qe_pipelines.progress import run_view
from qe_pipelines.status import Heartbeat, duration, judge, watch
from rich.console import Console

from qe_dist.flow.progress import RunState, read_state
from qe_dist.io import journal as module
from qe_dist.io.journal import JOURNAL, Journal, read_journal
from qe_dist.io.lock import Owner, RunLock
from qe_dist.io.run_dir import RunDir

BATCHES, TOKENS = 4, 300
START, LOAD, BATCH, FIT = 30.0, 5.0, 2.0, 7.0
STAGES = ((0, 1), (2, 3))
"""Blocks of the two workers of a wave; the next wave has those behind them."""


class Driver:
    """Tells a journal what a driver would, on a clock of its own."""

    def __init__(self, run_dir, monkeypatch):
        self.path = run_dir / ".run" / JOURNAL
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.time = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.time)
        self.journal = Journal(self.path)

    def tell(self, event, after=0.0, **data):
        self.time += after
        self.journal(event, data)

    def start(self, blocks=8, done=0):
        self.tell("start", batches=BATCHES, blocks=blocks, done=done, first=done, workers=2)

    def wave(self, number=1, first=0):
        blocks = [[b + first for b in stage] for stage in STAGES]
        stages = [{"worker": w, "node": "ab"[w], "blocks": part} for w, part in enumerate(blocks)]
        self.tell("wave", number=number, first=first, last=blocks[-1][-1], stages=stages)

    def batch(self, index, wave=1):
        first = START if wave == 1 else LOAD
        self.tell("batch", first if index == 0 else BATCH, wave=wave, index=index, tokens=TOKENS)

    def block(self, index, after, fallbacks=()):
        report = {"index": index, "groups": {}, "fallbacks": {layer: ["damped"] for layer in fallbacks}}
        self.tell("block", after, **report, seconds=FIT, worker=index // 2 % 2)

    def whole_wave(self, number=1, first=0):
        """Two workers fit two blocks each, at the same time."""
        self.wave(number, first)
        for i in range(BATCHES):
            self.batch(i, number)
        for block, after in ((0, FIT), (2, 0.0), (1, FIT), (3, 0.0)):
            self.block(first + block, after)

    @property
    def state(self) -> RunState:
        return read_state(read_journal(self.path)[0])


@pytest.fixture
def driver(tmp_path, monkeypatch):
    return Driver(tmp_path, monkeypatch)


@pytest.fixture
def locks(tmp_path):
    return RunDir(tmp_path).locks


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """What `qe-dist status RUN_DIR --once` prints; spaces are one each."""

    def call(run_dir=tmp_path, *options):
        monkeypatch.setattr("sys.argv", ["qe-dist", "status", str(run_dir), *options])
        with pytest.raises(SystemExit) as end:
            main.main()
        said = capsys.readouterr()
        return end.value.code, re.sub(r" +", " ", said.out + said.err)

    return call


# -- a run that works


def test_a_run_that_works(driver, status, locks):
    driver.start()
    driver.wave()
    for i in range(3):
        driver.batch(i)
    driver.tell("worker", worker=1, node="b", activity="stream", blocks=[2, 3], memory_mib=512.4, peak_mib=20480.0)
    with RunLock(locks):
        code, text = status()
    assert code == 0
    assert f"running: process {os.getpid()} on {socket.gethostname()} since 20" in text
    assert "blocks 0 of 8 finished" in text
    assert "wave 1 of 2, blocks 0-3" in text
    assert "batches 3 of 4, 150 tokens per second" in text
    assert "│ 0 │ a │ 0-1 │ load │" in text
    assert "│ 1 │ b │ 2-3 │ stream │ 512 MiB │ 20.0 GiB │" in text


def test_time_left_is_what_the_rest_takes_once_every_part_was_measured(driver):
    driver.start(blocks=10)  # the third wave is half as long
    driver.whole_wave()
    driver.wave(2, first=4)
    seen = []
    for i in range(BATCHES):
        driver.batch(i, wave=2)
        seen.append((driver.time, driver.state.left))
    for block, after in ((4, FIT), (6, 0.0), (5, FIT), (7, 0.0)):
        driver.block(block, after)
    seen.append((driver.time, driver.state.left))
    third = LOAD + (BATCHES - 1) * BATCH + FIT
    assert all(left.whole for _, left in seen)
    assert [left.seconds for _, left in seen] == pytest.approx([driver.time + third - then for then, _ in seen])


def test_time_left_is_a_lower_bound_before(driver, status):
    driver.start()
    driver.wave()
    driver.batch(0)
    driver.batch(1)
    left = driver.state.left
    # Two batches, and those of the next wave; no fit was seen yet, nor a wave that begins without starting processes.
    assert left.seconds == pytest.approx(2 * BATCH + 3 * BATCH)
    assert not left.whole
    assert "time left over 10 s (not all is measured yet)" in status()[1]


def test_a_wall_clock_that_jumps_back_spoils_nothing(driver, status, monkeypatch, locks):
    driver.start()
    driver.wave()
    driver.batch(0)
    driver.batch(1)
    before = driver.state
    monkeypatch.setattr(module, "now", lambda: "2001-01-01T00:00:00+00:00")
    driver.batch(2)
    after = driver.state
    assert after.wave.tokens_per_second == before.wave.tokens_per_second == 150
    assert after.left.seconds == pytest.approx(before.left.seconds - BATCH)
    with RunLock(locks):
        assert "running" in status()[1]


# -- lost workers, fall-backs, notes


def test_a_lost_worker_and_the_wave_that_is_streamed_again(driver, status):
    driver.start()
    driver.wave()
    for i in range(3):
        driver.batch(i)
    driver.tell("lost", 60.0, worker=1, node="b", reason="its node is gone", blocks=[2, 3])
    _, text = status()
    assert "lost 1, last worker 1 on b at 20" in text
    assert "its node is gone" in text
    assert "│ 1 │ b │ 2-3 │ lost │ │ │" in text
    driver.tell("again", wave=1, from_batch=0)
    driver.tell("worker", worker=1, node="c", activity="load", blocks=[2, 3], memory_mib=None, peak_mib=None)
    assert "batches 0 of 4 \n" in status()[1]
    driver.batch(0)
    driver.batch(1)
    _, text = status()
    assert "batches 2 of 4, 150 tokens per second" in text  # the minute of the loss does not count
    assert "│ 1 │ c │ 2-3 │ load │" in text
    assert driver.state.seconds["start"] == START


def test_fall_backs_and_notes_are_shown(driver, status):
    driver.start()
    driver.wave()
    driver.block(0, FIT, fallbacks=["layers.0.q_proj", "layers.0.k_proj"])
    driver.tell("note", text="the disk [/tmp] is full")
    _, text = status()
    assert "fall-backs 2, last layers.0.k_proj: damped" in text
    assert "note the disk [/tmp] is full" in text


def test_events_of_the_future_change_nothing(driver):
    driver.start()
    before = driver.state
    driver.tell("moon", phase="full")
    assert driver.state == before


# -- calls that continue each other


def test_a_run_that_was_killed_and_typed_again(driver, status, tmp_path, monkeypatch):
    driver.start(blocks=12)
    driver.whole_wave()
    driver.wave(2, first=4)
    for i in range(BATCHES):
        driver.batch(i, wave=2)
    driver.block(4, FIT, fallbacks=["layers.4.q_proj"])
    driver.tell("lost", worker=1, node="b", reason="killed", blocks=[6, 7])
    with driver.path.open("ab") as file:
        file.write(b'{"call": "abc", "ti')  # the kill came in the middle of a write
    second = Driver(tmp_path, monkeypatch)
    second.start(blocks=12, done=5)
    second.wave(first=4)
    _, text = status()
    assert "call 2, since" in text
    assert "blocks 5 of 12 finished" in text
    assert "fall-backs 1" in text
    assert "lost 1" in text
    # Three blocks to fit in this wave, two of them on one worker; what the first call measured holds.
    expected = START + LOAD + 2 * ((BATCHES - 1) * BATCH + 2 * FIT)
    assert second.state.left.whole
    assert second.state.left.seconds == pytest.approx(expected)
    for i in range(BATCHES):
        second.batch(i)
    second.block(6, FIT)
    assert second.state.left.seconds == pytest.approx(expected - START - (BATCHES - 1) * BATCH - FIT)
    assert "blocks 6 of 12 finished" in status()[1]


def test_blocks_that_another_recipe_takes_back_are_to_be_fitted_again(driver, tmp_path, monkeypatch):
    driver.start(blocks=4)
    driver.whole_wave()
    driver.tell("done", seconds=driver.time)
    second = Driver(tmp_path, monkeypatch)
    second.start(blocks=4, done=0)
    second.wave()
    assert second.state.left.seconds == pytest.approx(START + (BATCHES - 1) * BATCH + 2 * FIT)


@pytest.mark.parametrize(("event", "said"), [("done", "finished"), ("stop", "stopped: SIGTERM; type the same command")])
def test_the_last_word_stands(driver, status, event, said):
    driver.start(blocks=4)
    driver.whole_wave()
    driver.tell(event, reason="SIGTERM", seconds=50.0)
    _, text = status()
    assert said in text
    assert "blocks 4 of 4 finished" in text
    assert "time left" not in text
    assert "│" not in text


def test_a_stopped_run_that_is_locked_ends_in_a_moment_or_begins_anew(driver, status, locks):
    driver.start()
    driver.tell("stop", reason="SIGTERM")
    with RunLock(locks):
        assert "running: process" in status()[1]
    assert "stopped: SIGTERM" in status()[1]


# -- a driver that says nothing


CHILD = """
import sys, time
from qe_dist.io.journal import JOURNAL, Journal
from qe_dist.io.run_dir import RunDir

run = RunDir(sys.argv[1])
with run.lock():
    tell = Journal(run.root / JOURNAL)
    tell("start", dict(batches=4, blocks=8, done=2, first=2, workers=1))
    print("told", flush=True)
    time.sleep(60)
"""


def test_a_driver_that_was_killed(tmp_path, status):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "told\n"
        assert f"running: process {child.pid}" in status()[1]
        child.kill()
    code, text = status()
    assert code == 0
    assert f"dead: process {child.pid} on {socket.gethostname()}" in text
    assert "type the same command again to continue" in text
    assert "blocks 2 of 8 finished" in text


def test_a_driver_that_ended_without_a_word(driver, status, locks):
    with RunLock(locks):
        driver.start()
    assert f"ended early, without a last word: process {os.getpid()}" in status()[1]


FAR = Owner(id="1", host="far", machine="of another boot", pid=7, started="1", since="noon")


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (Heartbeat(owner=None, quiet=5), "running"),
        (Heartbeat(owner=None, quiet=660), "probably dead: no heartbeat for 11 min of an unknown"),
        (Heartbeat(owner=FAR, quiet=5), "running: process 7 on far since noon"),
        (Heartbeat(owner=FAR, quiet=90), "probably dead: no heartbeat for 1 min 30 s of process 7 on far since noon"),
        (Heartbeat(owner=FAR, quiet=-3600), "running"),  # the other host's clock is ahead
    ],
)
def test_what_counts_as_dead(last, said):
    condition = judge(RunState(), last)
    assert condition.text.startswith(said)
    assert condition.alive == said.startswith("running")


def test_the_lock_of_another_host_is_its_heartbeat(driver, status, locks):
    driver.start()
    locks.mkdir()
    lock = locks / "00000003"
    lock.with_name("00000002").write_text("an older one")
    lock.write_text(json.dumps(vars(FAR)))
    assert "running: process 7 on far" in status()[1]
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert "probably dead: no heartbeat for 1 h of" in status()[1]


# -- the command


def test_a_directory_that_is_no_run(tmp_path, status):
    code, text = status(tmp_path / "nowhere")
    assert code == 2
    assert "nowhere is no run: expected" in text.replace("\n", "")
    assert "Traceback" not in text


def test_a_journal_of_another_version(driver, status):
    driver.tell("wave", of="another form")
    code, text = status()
    assert code == 2
    assert "is of another version of qe_dist" in text.replace("\n", " ")


def test_an_empty_journal_is_a_run_that_just_begins(driver, status):
    driver.path.write_text("")
    assert status()[0] == 0


def test_once_prints_once_on_a_terminal_too(driver, status, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    driver.start()
    code, text = status(tmp_path, "--once")
    assert code == 0
    assert text.count("running") == 1


def test_on_a_terminal_it_goes_on_until_the_run_ends(driver, status, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("qe_pipelines.status.REFRESH_SECONDS", 0.02)
    driver.start()
    threading.Timer(0.3, lambda: driver.tell("done", seconds=1.0)).start()
    code, text = status()
    assert code == 0
    assert text.count("running") > 1
    assert "finished" in text


def test_ctrl_c_ends_it_without_a_word(driver, status, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    driver.start()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    code, text = status()
    assert code == 0
    assert "running" in text
    assert "Traceback" not in text


def test_watching_counts_nothing_twice(driver, tmp_path):
    driver.start()
    driver.tell("lost", worker=1, node="b", reason="killed", blocks=[2, 3])
    views = watch(tmp_path)
    next(views)
    driver.wave()
    console = Console(file=io.StringIO(), width=120)
    console.print(next(views))
    assert "1 of 2, blocks 0-3" in console.file.getvalue()
    assert "1, last worker 1 on b" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_durations_have_two_units(seconds, said):
    assert duration(seconds) == said


# -- the view of the command itself


@pytest.fixture
def told(driver, capsys):
    """What the command prints while these events happen (the bars go away)."""

    def call(happen, view=lambda view: view):
        with run_view(quiet=False) as whole:
            driver.journal = view(whole)
            happen()
        return capsys.readouterr().out

    return call


def happen(driver):
    driver.start()
    driver.wave()
    driver.batch(0)
    driver.block(0, FIT)
    driver.tell("lost", worker=1, node="b", reason="its node is gone", blocks=[2, 3])
    driver.tell("again", wave=1, from_batch=0)
    driver.tell("stop", reason="SIGTERM")


def test_the_view_has_a_line_for_every_block_and_everything_that_went_wrong(driver, told):
    text = told(lambda: happen(driver))
    assert "block   0     7.0 s" in text
    assert "lost worker 1 on b: its node is gone" in text
    assert "wave 1 is streamed again, from batch 0" in text
    assert "SIGTERM" not in text  # the command itself tells it as it ends


def test_without_lines_the_view_says_only_what_went_wrong(driver, told):
    text = told(lambda: happen(driver), lambda view: view.without_lines())
    assert "block   0" not in text
    assert "lost worker 1" in text


def test_the_bars_follow_the_state(driver, monkeypatch):
    with run_view(quiet=True) as view:
        driver.journal = view
        driver.start()
        driver.wave()
        driver.batch(0)
        driver.block(0, FIT)
        stream, fit = view.bar.tasks
    assert (stream.description, stream.completed, stream.total) == ("wave 1 of 2", 1, BATCHES)
    assert (fit.completed, fit.total) == (1, 8)
    assert fit.fields["left"].startswith("over ")
