"""One run per directory, whoever crashes, wherever it runs, whatever the clocks say. Heartbeats are frequent here."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qe_dist.core.errors import CheckpointError, ConfigError, QEError
from qe_dist.io.lock import Owner, RunLock
from qe_dist.io.run_dir import RunDir

HEARTBEAT_SECONDS, MISSED_HEARTBEATS = 0.02, 4


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / ".run" / "lock"


def lock(folder):
    return RunLock(folder, HEARTBEAT_SECONDS, MISSED_HEARTBEATS)


def leave(folder, number=1, **changes):
    """A lock file as another process would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = replace(Owner.this_process(), id="other", **changes)
    (folder / f"{number:08d}").write_text(json.dumps(asdict(owner)))
    return owner


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(HEARTBEAT_SECONDS / 4)


def test_the_second_run_ends_naming_host_process_and_time_of_the_first(folder):
    with lock(folder) as first:
        said = rf"{folder.parent.parent} is in use by process {os.getpid()} on {first.owner.host} since \d{{4}}-"
        with pytest.raises(ConfigError, match=said), lock(folder):
            pass
        first.check()
        assert not first.lost


def test_a_released_lock_is_free_at_once(folder):
    for _ in range(3):
        with RunLock(folder, heartbeat_seconds=60):
            pass
    assert len(list(folder.iterdir())) == 1


def test_a_lock_is_released_when_its_run_fails(folder):
    with pytest.raises(KeyError), RunLock(folder, heartbeat_seconds=60):
        raise KeyError
    with RunLock(folder, heartbeat_seconds=60):
        pass


def test_a_dead_owner_on_this_machine_is_replaced_at_once(folder):
    gone = subprocess.Popen(["true"])
    gone.wait()
    leave(folder, pid=gone.pid)
    with RunLock(folder, heartbeat_seconds=60):
        pass


def test_a_process_that_nobody_has_waited_for_is_dead(folder):
    zombie = subprocess.Popen(["true"])
    wait_for(lambda: Owner.this_process().started and _state(zombie.pid) == "Z")
    leave(folder, pid=zombie.pid, started=_started(zombie.pid))
    with RunLock(folder, heartbeat_seconds=60):
        pass
    zombie.wait()


def test_another_process_with_the_id_of_the_dead_owner_does_not_block(folder):
    leave(folder, pid=os.getpid(), started="1")
    with RunLock(folder, heartbeat_seconds=60):
        pass


def test_a_live_owner_on_this_machine_is_not_replaced_even_if_it_gives_no_heartbeat(folder):
    leave(folder)
    with pytest.raises(ConfigError, match="is in use by"), lock(folder):
        pass


def test_a_silent_owner_elsewhere_is_replaced_after_so_many_missed_heartbeats(folder):
    leave(folder, machine="elsewhere", pid=1)
    begin = time.monotonic()
    with lock(folder):
        assert time.monotonic() - begin >= HEARTBEAT_SECONDS * MISSED_HEARTBEATS


def test_an_owner_elsewhere_that_gives_heartbeats_is_named_not_replaced(folder):
    owner = leave(folder, machine="elsewhere", host="node7", pid=1)
    alive = threading.Timer(0.5, leave, [folder], {"machine": "elsewhere", "host": "node7", "pid": 1, "beat": 1})
    alive.start()
    with pytest.raises(ConfigError, match=f"process 1 on node7 since {owner.since[:10]}"), RunLock(folder, 0.2, 20):
        pass
    alive.join()


@pytest.mark.parametrize("content", ["", '{"id": ', "[1, 2]"])
def test_a_lock_that_cannot_be_read_counts_as_silent(folder, content):
    folder.mkdir(parents=True)
    (folder / "00000001").write_text(content)
    with lock(folder):
        pass


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_neither_steals_nor_blocks(folder, monkeypatch, jump):
    """Time of day here, and on the file server that stamps files."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() + jump) * 1e9))
    leave(folder, machine="elsewhere", since="1970-01-01T00:00:00" if jump > 0 else "2099-01-01T00:00:00")
    os.utime(folder / "00000001", (now() + jump, now() + jump))
    begin = time.monotonic()
    with lock(folder) as mine:
        assert HEARTBEAT_SECONDS * MISSED_HEARTBEATS <= time.monotonic() - begin < 5
        os.utime(folder / "00000002", (now() + jump, now() + jump))
        with pytest.raises(ConfigError, match="is in use"), lock(folder):
            pass
        time.sleep(3 * HEARTBEAT_SECONDS)
        assert not mine.lost


def test_an_owner_notices_at_the_next_heartbeat_that_it_was_replaced(folder):
    with lock(folder) as mine:
        leave(folder, number=2, host="node7", machine="elsewhere")
        wait_for(lambda: mine.lost)
        with pytest.raises(QEError, match=r"taken over by process \d+ on node7"):
            mine.check()
    assert json.loads((folder / "00000002").read_text())["host"] == "node7"
    assert not json.loads((folder / "00000002").read_text())["released"]


def test_an_owner_notices_when_the_directory_is_gone(folder):
    with lock(folder) as mine:
        shutil.rmtree(folder)
        wait_for(lambda: mine.lost)
        with pytest.raises(QEError, match="taken over by another run"):
            mine.check()


def test_a_disk_without_room_for_a_heartbeat_is_no_loss(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with lock(folder) as mine:
        monkeypatch.setattr(Path, "write_text", full)
        time.sleep(3 * HEARTBEAT_SECONDS)
        monkeypatch.undo()
        assert not mine.lost
        before = mine.owner.beat
        wait_for(lambda: mine.owner.beat > before)
        monkeypatch.setattr(Path, "write_text", full)
    with RunLock(folder, heartbeat_seconds=60):  # it could be released
        pass


def test_a_directory_of_others_is_refused_before_anything_is_written_into_it(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a run of ours"), RunDir(tmp_path).lock():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_new_directory_can_be_locked_before_it_is_claimed(tmp_path):
    store = RunDir(tmp_path / "out")
    with store.lock():
        assert not store.open({"a": 1}, "auto")
    with store.lock():
        assert store.open({"a": 1}, "auto")


def test_where_nothing_can_be_written_the_message_says_so(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"), lock(tmp_path / "out" / "lock"):
        pass


RACE = """
import json, os, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from qe_dist.core.errors import ConfigError
from qe_dist.io.lock import Owner, RunLock

root, rounds, takers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def take(folder, number, barrier):
    while not barrier.exists():
        time.sleep(0.001)
    try:
        with RunLock(folder, heartbeat_seconds=0.01, missed_heartbeats=3):
            (folder.parent / f"won-{number}").touch()
            while len(list(folder.parent.glob("*-*"))) < takers:  # until all others have tried
                time.sleep(0.01)
    except ConfigError as error:
        assert "is in use by process" in str(error), error
        (folder.parent / f"refused-{number}").touch()

for i in range(rounds):
    folder = root / str(i) / "lock"
    folder.mkdir(parents=True)
    stale = replace(Owner.this_process(), **({"pid": 2**22 - 1} if i % 2 else {"machine": "elsewhere"}))
    (folder / "00000001").write_text(json.dumps(asdict(stale)))
    children = []
    for number in range(takers):
        child = os.fork()
        if child == 0:
            take(folder, number, root / str(i) / "go")
            os._exit(0)
        children.append(child)
    (root / str(i) / "go").touch()
    for child in children:
        os.waitpid(child, 0)
"""


def test_of_many_processes_that_take_over_a_stale_lock_exactly_one_wins(tmp_path):
    rounds, takers = 4, 4
    subprocess.run([sys.executable, "-c", RACE, tmp_path, str(rounds), str(takers)], check=True, timeout=120)
    for i in range(rounds):
        names = sorted(p.name for p in (tmp_path / str(i)).iterdir())
        assert sum(n.startswith("won") for n in names) == 1, names
        assert sum(n.startswith("refused") for n in names) == takers - 1, names


TURNS = """
import os, sys, time
from pathlib import Path
from qe_dist.core.errors import ConfigError
from qe_dist.io.lock import RunLock

root, workers, turns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
children = []
for number in range(workers):
    child = os.fork()
    if child == 0:
        done = 0
        while done < turns:
            try:
                with RunLock(root / "lock"):
                    os.close(os.open(root / "inside", os.O_CREAT | os.O_EXCL))  # fails if another is inside
                    os.unlink(root / "inside")
                    done += 1
            except ConfigError:
                time.sleep(0.001)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children))
"""


def test_of_processes_that_take_turns_never_two_are_inside(tmp_path):
    subprocess.run([sys.executable, "-c", TURNS, tmp_path, "3", "15"], check=True, timeout=120)


def _stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _state(pid):
    return _stat(pid)[0]


def _started(pid):
    return _stat(pid)[19]
