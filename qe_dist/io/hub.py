"""Models by their names on the Hugging Face hub: found in its cache, or fetched into it, as transformers does it."""

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qe_dist.core.errors import ConfigError, TemporaryError
from qe_dist.io.bucket import is_url

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
NOT_WANTED = ("*/*", "consolidated*", "*.onnx.json")
"""Files in folders of a repository are its weights in other forms."""


class _Bar(tqdm):
    """A bar on a terminal, and none elsewhere."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"disable": None})


def find(model: Path | str, revision: str | None = None) -> Path | str:
    """The folder or URL of a model.

    model: a folder, a URL, or a name on the hub, whose files are fetched unless the cache has them (HF_HOME,
    HF_HUB_OFFLINE and HF_TOKEN are obeyed). revision: a branch, tag or commit of such a name. Raises ConfigError for
    what is none of these, and TemporaryError when the way to the hub breaks off.
    """
    name, place = str(model), Path(model)
    if not name.strip() or "\0" in name:
        said = "has a NUL" if name.strip() else "is empty"
        raise ConfigError(f"the name of a model {said}; give a folder, a URL, or a name on the Hugging Face hub")
    if is_url(name) or place.exists() or not is_name(name):
        if revision is not None:
            raise ConfigError(
                f"--revision {revision} is for a model on the Hugging Face hub, and {name} is not its name"
            )
        if not is_url(name) and name.startswith("~"):
            place = place.expanduser()
        return name if is_url(name) else place
    return _fetched(name, revision)


def is_name(model: str) -> bool:
    """Whether something may be a name on the hub: NAME or OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not model.startswith(("/", ".", "~"))


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(NOT_WANTED),
                tqdm_class=_Bar,
            )
        )
    except errors.GatedRepoError:
        raise ConfigError(
            f"{name} on the Hugging Face hub asks for consent: give it on its page, and log in by `hf auth login` or "
            "HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{name} is no folder here, and the Hugging Face hub shows no such model; correct the name, or, if it is "
            "private, log in by `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{name} on the Hugging Face hub has no revision {revision}") from None
    except errors.LocalEntryNotFoundError as error:
        offline = any(os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE") for v in OFFLINE)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_reason(error)})"
        raise ConfigError(
            f"{name} is no folder here, and no model{at} in the cache of the Hugging Face hub ({_cache()}), and {why}; "
            "give a folder, or fetch it where there is a network"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise TemporaryError(
            f"{name}{at} could not be fetched from the hub: {_reason(error)}; type the same command again; "
            "it goes on where it stopped"
        ) from None


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0].removeprefix("Got: ")[:160] or type(cause).__name__


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
