"""The options by which every command reads samples, said once."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from qe_dist.core.errors import ConfigError

SOURCE = "JSON lines, folder, parquet, hf:NAME#SPLIT, or a.jsonl=0.6,b.parquet=0.4"


def options_of_reading(
    columns: Annotated[str | None, typer.Option(help="what the data calls things: question=query,unused=score")] = None,
    samples: Annotated[int | None, typer.Option(help="read at most so many", min=1)] = None,
    image_root: Annotated[Path | None, typer.Option(help="where relative paths of images begin")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="scale images up to so many", min=1)] = None,
    max_pixels: Annotated[int | None, typer.Option(help="scale images down to so many", min=1)] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="fetch images from http and https")] = False,
    skip_bad: Annotated[str | None, typer.Option(help="most faulty samples to leave out, like 1%")] = None,
) -> Any:
    """The `ReadOptions` that they amount to. ConfigError for what is none."""
    from qe_dist.core.sample import PixelBounds
    from qe_dist.data.options import ReadOptions

    return ReadOptions(
        columns=_pairs(columns),
        limit=samples,
        image_root=image_root,
        allow_remote=allow_remote,
        skip_bad=_share(skip_bad),
        bounds=PixelBounds(min_pixels, max_pixels),
    )


def reads_samples(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options above, which it gets as one argument `reading`."""
    own, added = inspect.signature(command).parameters, inspect.signature(options_of_reading).parameters

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        reading = options_of_reading(**{name: given.pop(name) for name in added})
        command(**given, reading=reading)

    kept = [parameter for name, parameter in own.items() if name != "reading"]
    hints = get_type_hints(command, include_extras=True) | get_type_hints(options_of_reading, include_extras=True)
    wrapped.__signature__ = inspect.Signature([*kept, *added.values()])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {name: hints[name] for name in (*(one.name for one in kept), *added)}
    return wrapped


def _pairs(text: str | None) -> tuple[tuple[str, str], ...]:
    pairs = [piece.partition("=") for piece in text.split(",")] if text else []
    if any(not ours.strip() or not theirs.strip() for ours, _, theirs in pairs):
        raise ConfigError(f"--columns must be like question=query,answer=reply, found {text!r}")
    return tuple((ours.strip(), theirs.strip()) for ours, _, theirs in pairs)


def _share(text: str | None) -> float:
    """The share that 1%, or 0.01, says."""
    try:
        return 0.0 if text is None else float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ConfigError(f"--skip-bad must be a share like 1%, found {text!r}") from None
