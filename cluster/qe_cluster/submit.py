"""Runs qe-dist commands as jobs of a Ray cluster, through its Jobs API.

The nodes have torch, transformers and Ray; qe_dist travels with the job, as a wheel of this checkout or as it is
installed here. It is unpacked and becomes the job's working directory, which comes first in the search for modules, on
the head and on workers. (A wheel in `py_modules` is installed with all its dependencies, from the network, on every
node; folders in `py_modules` come behind whatever lies where the head node was started.)
"""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import qe_dist
from qe_cluster.launch import TOKEN_HELP
from qe_dist.core.errors import ConfigError, QEError, TemporaryError

BUILD_SECONDS = 600
"""To build a wheel of a checkout, which takes a few."""
SILENT_SECONDS = 60.0
"""A job may say nothing for so long before its cluster is asked for an answer, which may take as long."""
LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""What Ray calls the end of a job by what happened around it."""
PACKAGES = ("qe_dist", "qe_kernels", "qe_cluster", "qe_pipelines")


def connect(address: str | None) -> JobSubmissionClient:
    """Returns a client of the cluster's Jobs API.

    address: the cluster's dashboard, http://HOST:8265, or HOST:PORT of a cluster whose network this machine is in;
    default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster of this machine.

    Raises ConfigError when no cluster answers, or when it refuses our token.
    """
    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this variable to an argument
    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        raise ConfigError(f"the Ray cluster refuses our token: {str(error).splitlines()[0]}; {TOKEN_HELP}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster takes jobs: {error} Name its dashboard by --address http://HOST:8265; where it is bound "
            "to the head node's localhost, forward the port: ssh -L 8265:localhost:8265 HOST"
        ) from None


def submit(client: JobSubmissionClient, command: Sequence[str]) -> str:
    """Starts `qe-dist COMMAND` on the head node, and returns the job's id. Raises QEError when Ray refuses the job."""
    entrypoint = shlex.join(["python", "-m", "qe_pipelines.main", *command])
    with packages() as folder:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
        except (OSError, RuntimeError) as error:
            raise QEError(f"the Ray cluster did not take the job: {error}") from None


@contextmanager
def packages() -> Iterator[Path]:
    """A temporary folder with our packages: from a wheel that is built of this checkout, or copied from where qe_dist
    is installed. Raises QEError when no wheel can be built."""
    home = Path(qe_dist.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, "packages")
        if (home / "pyproject.toml").exists():
            with zipfile.ZipFile(_wheel(home, Path(folder))) as wheel:
                wheel.extractall(unpacked)
        else:
            for name in PACKAGES:
                shutil.copytree(home / name, unpacked / name, ignore=shutil.ignore_patterns("__pycache__"))
        yield unpacked


def _wheel(source: Path, folder: Path) -> Path:
    """Builds a wheel, and all that belongs to the build, in `folder`: what setuptools leaves in a checkout would get
    into the next wheel."""
    config = folder / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    environment = os.environ | {"DIST_EXTRA_CONFIG": str(config)}
    try:
        built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise TemporaryError(f"pip did not build a wheel from {source} within {BUILD_SECONDS} s") from None
    if built.returncode != 0:
        output = f"{built.stdout}\n{built.stderr}".strip()
        raise QEError(f"no wheel could be built from {source}; that needs pip, setuptools >= 80 and wheel. {output}")
    return next(folder.glob("*.whl"))


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """Passes the job's log to `write` until the job ends, and returns the exit code of its command.

    Ray has no exit code of a job that was stopped or whose node was lost (then 75 is returned, since the command can be
    continued) or that never ran (1). An interrupt ends this function and leaves the job running. Raises ConfigError
    when there is no such job, and TemporaryError when the connection is lost.
    """
    try:
        client.get_job_info(job)
    except RuntimeError:
        known = ", ".join(str(one.submission_id) for one in client.list_jobs() if one.submission_id) or "none"
        raise ConfigError(f"the cluster has no job {job}; its jobs: {known}") from None
    try:
        asyncio.run(_tail(client, job, write))
        end = client.get_job_info(job)
    except (ClientError, OSError, RuntimeError) as error:
        raise TemporaryError(
            f"the log of job {job} broke off: {error}. The job may go on: qe-dist submit --attach {job}"
        ) from None
    if end.driver_exit_code is not None:
        return end.driver_exit_code
    write(f"job {job}: {end.message}\n")
    return os.EX_TEMPFAIL if end.status == JobStatus.STOPPED or end.error_type in LOST else 1


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> None:
    """Passes the log on until the job ends. While it says nothing, asks again and again whether the cluster is there:
    a head that lost its network closes no connection. Raises OSError when it does not answer within SILENT_SECONDS."""
    log = aiter(client.tail_job_logs(job))
    while True:
        following = asyncio.ensure_future(anext(log))
        while not (await asyncio.wait({following}, timeout=SILENT_SECONDS))[0]:
            # as `client.get_version`, which waits without end
            await asyncio.to_thread(client._do_request, "GET", "/api/version", timeout=SILENT_SECONDS)
        try:
            write(following.result())
        except StopAsyncIteration:
            return
