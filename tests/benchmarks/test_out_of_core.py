"""The memory of a command is that of all its processes, wherever they hang, and no one else's."""

import importlib
import sys
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HOLD = """
import pathlib, sys, time, uuid
kept = bytearray(b'1') * (100 * 2**20)
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(folder / uuid.uuid4().hex).touch()
while len([*folder.iterdir()]) < number:
    time.sleep(0.05)
time.sleep(2)
"""
"""Holds an array until so many processes hold theirs, and two seconds more: on a busy machine one may start late."""
ORPHAN = f"""
import subprocess, sys
start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]])"
subprocess.Popen([sys.executable, "-c", start, {HOLD!r}, *sys.argv[1:]], start_new_session=True).wait()
{HOLD}
"""


@pytest.fixture
def script(monkeypatch):
    """Imports a file of benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.parametrize(("code", "arrays"), [(HOLD, 1), (ORPHAN, 2)], ids=["one process", "with an orphan"])
def test_the_memory_of_every_process_of_a_command_is_counted(script, tmp_path, code, arrays):
    held = tmp_path / "held"
    held.mkdir()
    command = [sys.executable, "-c", code, str(held), str(arrays)]
    watched = script("memory").watch(command, tmp_path / "log", interval=0.05)
    assert watched.code == 0, (tmp_path / "log").read_text()
    assert 100 * arrays < watched.peak.total < 100 * arrays + 60


def test_a_process_that_has_no_environment_yet_is_asked_again(script, tmp_path, monkeypatch):
    environ, asked = psutil.Process.environ, set()

    def from_the_second_time_on(process):
        first = process.pid not in asked
        asked.add(process.pid)
        return {} if first else environ(process)

    monkeypatch.setattr(psutil.Process, "environ", from_the_second_time_on)
    held = tmp_path / "held"
    held.mkdir()
    command = [sys.executable, "-c", HOLD, str(held), "1"]
    watched = script("memory").watch(command, tmp_path / "log", interval=0.05)
    assert 100 < watched.peak.total < 160


def test_the_exit_code_and_the_output_are_kept(script, tmp_path):
    watched = script("memory").watch([sys.executable, "-c", "print('said'); raise SystemExit(75)"], tmp_path / "log")
    assert watched.code == 75
    assert (tmp_path / "log").read_text() == "said\n"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ray::StageActor.forward", "stage"),
        ("ray::Embedder", "embedder"),
        ("ray::IDLE", "ray"),
        ("ray::DashboardAgent", "ray"),
        ("/x/raylet --store_socket_name=y", "ray"),
        ("python -m qe_pipelines.main quantize model", "driver"),
    ],
)
def test_kinds_of_processes_are_told_by_their_command_lines(script, line, kind):
    assert script("memory")._kind(line) == kind


def test_a_long_run_is_thinned_and_keeps_its_peak(script):
    memory, benchmark = script("memory"), script("out_of_core")
    samples = [memory.Sample(i / 5, {"driver": 1000.0 if i == 777 else i % 7}) for i in range(5000)]
    points = benchmark.thinned(memory.Watched(samples=samples))
    assert len(points) <= benchmark.POINTS
    assert (155.4, 1000.0) in points


def test_the_peak_while_a_process_is_gone_is_found(script):
    memory = script("memory")
    samples = [memory.Sample(float(i), mib) for i, mib in enumerate(({"a": 5.0, "b": 9.0}, {"a": 7.0}, {"a": 6.0}))]
    watched = memory.Watched(samples=samples)
    assert (watched.peak.total, watched.peak_without("b").total) == (14.0, 7.0)
