"""Names on the Hugging Face hub, without a network: what its cache holds, and what is said of the rest."""

from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from qe_dist.core.errors import ConfigError, TemporaryError
from qe_dist.io import hub

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that has org/name at two revisions, its files as links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "models--org--name"
    for name, commit in COMMITS.items():
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / name).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "blobs" / name).write_text("{}")
        (root / "snapshots" / commit / "config.json").symlink_to(Path("../../blobs") / name)
    return root


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "main"), ("main", "main"), ("v1", "v1"), (COMMITS["v1"], "v1")]
)
def test_a_name_is_found_in_the_cache_at_its_revision(cache, revision, commit):
    found = hub.find("org/name", revision)
    assert found == cache / "snapshots" / COMMITS[commit]
    assert (found / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v2"), ("other", None)])
def test_what_the_cache_does_not_have_is_said_in_one_line(cache, name, revision):
    with pytest.raises(ConfigError) as error:
        hub.find(name, revision)
    said = str(error.value)
    assert said.startswith(f"{name} is no folder here")
    assert "HF_HUB_OFFLINE is set" in said
    assert "\n" not in said


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.find("org/name") == Path("org/name")


@pytest.mark.parametrize("model", ["s3://bucket/model", "/no/such/folder", "./model", "a/b/c", "-x"])
def test_what_is_no_name_stays_as_it_is_and_has_no_revision(model):
    assert str(hub.find(model)) == str(Path(model) if "://" not in model else model)
    with pytest.raises(ConfigError, match="--revision v1 is for a model on the Hugging Face hub"):
        hub.find(model, "v1")


@pytest.mark.parametrize(("name", "says"), [("", "is empty"), (" ", "is empty"), ("a\0b", "has a NUL")])
def test_a_name_that_is_none(name, says):
    with pytest.raises(ConfigError, match=f"the name of a model {says}"):
        hub.find(name)


class Response:
    """What huggingface_hub reads of an answer."""

    headers: dict[str, str] = {}  # noqa: RUF012
    status_code, request = 404, None


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (lambda: errors.RepositoryNotFoundError("401", response=Response()), ConfigError, "shows no such model"),
        (lambda: errors.GatedRepoError("403", response=Response()), ConfigError, "asks for consent"),
        (lambda: errors.RevisionNotFoundError("404", response=Response()), ConfigError, "has no revision v9"),
        (lambda: OSError(28, "No space left on device"), TemporaryError, "No space left on device"),
        (lambda: errors.HfHubHTTPError("503 Server Error\nmore", response=Response()), TemporaryError, "503 Server"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(monkeypatch, error, kind, says):
    def refuse(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(kind) as told:
        hub.find("org/none", "v9")
    assert says in str(told.value)
    assert "\n" not in str(told.value)
