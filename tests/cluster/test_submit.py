"""`qe-dist submit` against a real cluster: the command's bytes, its exit code, its log, whoever follows it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from qe_cluster.submit import PACKAGES, packages

import qe_dist
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from tests.cluster.conftest import files
from tests.tiny import calibration, tiny_model

ROOT = Path(__file__).parents[2]
QE_DIST = ("-m", "qe_pipelines.main")
STOPPED = """
import sys, time
from qe_cluster.submit import connect, follow
client = connect(sys.argv[1])
job = client.submit_job(entrypoint="sleep 300")
while client.get_job_status(job) != "RUNNING":
    time.sleep(0.1)
client.stop_job(job)
sys.exit(follow(client, job, print))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("submit")
    model, data = tiny_model(root / "model"), calibration(root / "data")
    return RunConfig(model, load_recipe("qe-w4a6"), data, root / "local", samples_per_batch=2, sample_tokens=512)


def quantize(run: RunConfig, output: Path) -> list[str]:
    words = ("quantize", run.model, "--recipe", "qe-w4a6", "--calibration", run.calibration, "--output", output)
    return [*map(str, words), "--samples-per-batch", "2", "--sample-tokens", "512", "--workers", "1"]


@pytest.mark.ray
@pytest.mark.nightly
def test_a_job_goes_on_when_ctrl_c_ends_its_log_and_gives_the_bytes_of_one_process(started, run, tmp_path) -> None:
    command = [sys.executable, *QE_DIST, "submit", "--address", started.dashboard, *quantize(run, tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=started.environment(), stdout=pipe, stderr=pipe, text=True) as process:
        job = process.stderr.readline().removeprefix("job ").partition(";")[0]
        assert any("Running entrypoint" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert f"job {job} goes on" in said
    assert f"qe-dist submit --attach {job}" in said

    again = started.run(*QE_DIST, "submit", "--address", started.dashboard, "--attach", job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Running entrypoint" in again.stdout
    assert f"wrote {tmp_path / 'out'}" in again.stdout
    local.quantize(run)
    assert files(tmp_path / "out") == files(run.output)


@pytest.mark.ray
@pytest.mark.nightly
def test_the_exit_code_and_the_error_are_those_of_the_command(started, tmp_path) -> None:
    command = ("quantize", tmp_path, "--recipe", "nonsense", "--calibration", tmp_path, "--output", tmp_path / "out")
    done = started.run(*QE_DIST, "submit", "--", *command, RAY_API_SERVER_ADDRESS=started.dashboard)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error:" in done.stdout
    assert "nonsense" in done.stdout


@pytest.mark.ray
def test_the_example_runs_a_command(started) -> None:
    done = started.run(ROOT / "examples" / "submit.py", started.dashboard, "compare", "--list")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what recipes are made of" in done.stdout


@pytest.mark.ray
@pytest.mark.nightly
def test_a_job_that_was_stopped_ends_as_one_that_can_be_continued(started) -> None:
    done = started.run("-c", STOPPED, started.dashboard)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "stopped" in done.stdout


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("words", "change", "said"),
    [
        (("--attach", "nobody"), {}, "the cluster has no job nobody"),
        (("--attach", "nobody"), {"RAY_AUTH_TOKEN": "wrong"}, "set RAY_AUTH_MODE=token"),
        (("--address", "http://127.0.0.1:1", "--attach", "nobody"), {}, "Name its dashboard by --address"),
        ((), {}, "qe-dist submit quantize"),
    ],
    ids=["job", "token", "address", "command"],
)
def test_what_cannot_be_followed_is_named(started, words, change, said) -> None:
    done = started.run(*QE_DIST, "submit", *words, RAY_API_SERVER_ADDRESS=started.dashboard, **change)
    assert done.returncode == 2
    assert said in done.stderr


HANGS = """
import os, signal, sys
import psutil
from qe_cluster import submit
from qe_dist.core.errors import TemporaryError
submit.SILENT_SECONDS = 2.0
client = submit.connect(sys.argv[1])
job = client.submit_job(entrypoint="echo begun; sleep 300")
port = int(sys.argv[1].rpartition(":")[2])
dashboard = next(c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")
def write(text):
    os.kill(dashboard, signal.SIGSTOP)
try:
    submit.follow(client, job, write)
except TemporaryError as error:
    print("ended:", error)
finally:
    os.kill(dashboard, signal.SIGCONT)
    client.stop_job(job)
"""


@pytest.mark.ray
@pytest.mark.nightly
def test_a_cluster_that_answers_no_more_ends_the_log(started) -> None:
    done = started.run("-c", HANGS, started.dashboard)
    assert "ended: the log of job" in done.stdout, done.stdout + done.stderr


def test_a_checkout_travels_as_its_wheel_and_stays_clean() -> None:
    before = set(ROOT.iterdir())
    with packages() as folder:
        assert {path.name for path in folder.iterdir() if "dist-info" not in path.name} == set(PACKAGES)
        assert all((folder / name / "__init__.py").is_file() for name in PACKAGES)
    assert set(ROOT.iterdir()) == before


def test_of_an_installed_wheel_our_packages_travel_and_no_others(tmp_path, monkeypatch) -> None:
    for name in (*PACKAGES, "torch"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(qe_dist, "__file__", str(tmp_path / "qe_dist" / "__init__.py"))
    with packages() as folder:
        assert {path.name for path in folder.iterdir()} == set(PACKAGES)
