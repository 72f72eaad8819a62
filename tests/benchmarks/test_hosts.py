"""Hosts on one machine are hosts: with delay, bandwidth, a cable to pull, and an end. And a run survives the cable."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.hosts import benchmark
from benchmarks.network import megabits, network, round_trip_ms, why_not


@pytest.fixture(autouse=True)
def allowed():
    if why := why_not():
        pytest.skip(why)


def test_every_byte_takes_its_time():
    with network(["one", "other"], delay_ms=20, mbit=50) as (one, other):
        assert 40 <= round_trip_ms(one, other) < 200
        assert 5 < megabits(one, other) < 55
        assert one.traffic()["sent"] > 4 * 2**20
        assert other.traffic()["received"] > 4 * 2**20


def test_a_host_that_is_cut_off_reaches_nobody_until_it_is_back():
    with network(["one", "other"], delay_ms=0, mbit=100) as (one, other):
        other.cut()
        with pytest.raises(OSError, match="unreachable"):
            round_trip_ms(other, one)
        other.mend()
        assert round_trip_ms(other, one) < 100


def test_hosts_see_their_own_processes_and_files_in_memory_only():
    with network(["one", "other"], delay_ms=0, mbit=100) as (one, other):
        one.run("sh", "-c", "touch /dev/shm/mine; sleep 60 > /dev/null 2>&1 &")
        assert (one.processes("^sleep$"), other.processes("^sleep$")) == (1, 0)
        assert (one.run("ls", "/dev/shm"), other.run("ls", "/dev/shm")) == ("mine\n", "")
        assert (one.run("hostname"), other.run("hostname")) == ("one\n", "other\n")


def test_nothing_outlives_an_owner_that_is_killed():
    script = (
        "import time; from benchmarks.network import network\n"
        "with network(['one'], 0, 100) as (one,):\n"
        "    one.run('sh', '-c', 'sleep 61 > /dev/null 2>&1 &'); print(one.pid, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ) as owner:
        host = Path("/proc", owner.stdout.readline().decode().strip())
        assert host.exists()
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while host.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not host.exists()


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_of_which_a_host_is_cut_off_and_comes_back_gives_the_bytes_of_one_process():
    with tempfile.TemporaryDirectory(prefix="qe-") as folder:  # paths of sockets must be short
        result = benchmark(Path(folder), delay_ms=2, mbit=500, seed=0, blocks=4, samples=16)
    assert 4 <= result["network"]["measured_round_trip_ms"] < 100
    undisturbed, cut = result["cases"].values()
    assert undisturbed["equal"]
    assert [call["code"] for call in undisturbed["calls"]] == [0]
    assert cut["equal"]
    assert cut["lost"] in ("north", "south")
    assert cut["events"]["cut off"] < cut["events"]["declared dead"] < cut["events"]["in the cluster again"]
    assert cut["events"]["cut off"] < cut["events"]["checkpoint written"]
