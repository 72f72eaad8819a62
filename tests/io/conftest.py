"""Object storage as it is met in the world."""

from collections.abc import Iterator

import pytest

from qe_dist.io import bucket
from tests.s3 import s3_server


@pytest.fixture(scope="session")
def s3_storage() -> Iterator:
    with s3_server() as meter:
        yield meter


@pytest.fixture
def s3(s3_storage, monkeypatch):
    """An empty s3://models, as its meter."""
    monkeypatch.setattr(bucket, "PAUSES", (0.0, 0.0))
    s3_storage.empty()
    yield s3_storage
    s3_storage.faults = 0


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request, tmp_path) -> str:
    """A URL under which nothing lies yet."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    urls = {"file": f"file://{tmp_path}/bucket", "memory": f"memory://{tmp_path.name}", "s3": "s3://models/m"}
    return urls[request.param]
