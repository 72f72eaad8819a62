"""The models that commands are given: folders, URLs, and names on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from qe_dist.core.errors import ConfigError

Revision = Annotated[str | None, typer.Option(help="branch, tag or commit on the hub")]


def model_at(model: Path | str, revision: str | None = None) -> Path | str:
    """Its folder or URL. Says which folder a name on the hub is; raises as `qe_dist.io.hub.find` does."""
    from qe_dist.io.hub import find

    found = find(model, revision)
    if str(found) != str(model):
        typer.echo(f"{model}: {found}", err=True)
    return found


def folder_at(model: Path | str, revision: str | None = None) -> Path:
    """The folder of a model for commands that load it whole. ConfigError for a URL."""
    found = model_at(model, revision)
    if isinstance(found, str):
        raise ConfigError(f"{found} is a URL; this command reads models from disk, copy it first")
    return found


def folders_at(model: str, other: str | None, revision: str | None) -> tuple[Path, Path | None]:
    """Two folders, of which the revision is of the one that is named by its name on the hub. ConfigError where it could
    be of both."""
    from qe_dist.io.hub import is_name

    names = [name for name in (model, other) if name is not None and is_name(name) and not Path(name).exists()]
    if revision is not None and len(names) > 1:
        raise ConfigError(f"--revision could be of {names[0]} or of {names[1]}; fetch one first and give its folder")
    if other is None:
        return folder_at(model, revision), None
    of_other = other in names
    return folder_at(model, None if of_other else revision), folder_at(other, revision if of_other else None)
