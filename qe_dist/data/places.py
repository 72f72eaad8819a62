"""Where an image is said to be: a path, a `file:`, `data:` or `http:` address, or bytes in a table."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import ImageRef, PixelBounds
from qe_dist.data.options import ReadOptions
from qe_dist.data.remote import fetch
from qe_dist.data.scratch import scratch

IN_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How PNG, JPEG, GIF and WebP begin where a table has them as text."""
SHORTEST = 100
"""Characters of such a text."""
SHOWN = 60


@dataclass
class Finder:
    """Finds the images of samples."""

    options: ReadOptions
    known: dict[str, ImageRef] = field(default_factory=dict)
    """Those that were fetched, by address."""
    fetching: Lock = field(default_factory=Lock)

    def find(self, said: Any, origin: str, folder: Path, bounds: PixelBounds) -> ImageRef:
        """Where an image is. said: what a sample has in place of it. folder: where relative paths begin.

        Raises ConfigError, with `origin` in front, where it is nowhere.
        """
        least, most = self.options.bounds.least, self.options.bounds.most
        bounds = PixelBounds(bounds.least or least, bounds.most or most)
        match said:
            case {"bytes": bytes(content), **others}:
                return _held(content, str(others.get("path") or "image in the table"), bounds)
            case bytes(content):
                return _held(content, "image in the table", bounds)
            case {"path": str(name)} | {"url": str(name)} | str(name):
                return self._named(name, origin, folder, bounds)
            case {"base64": str(text)} | {"data": str(text)}:
                return _held(_decoded(text, origin), "image in base64", bounds)
        kind = f"an object with {sorted(said)}" if isinstance(said, Mapping) else f"{type(said).__name__}"
        raise ConfigError(f"{origin}: an image must be a path, an address or bytes, found {kind}")

    def _named(self, name: str, origin: str, folder: Path, bounds: PixelBounds) -> ImageRef:
        scheme = name[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            return self._fetched(name, origin, bounds)
        if scheme == "data":
            return _held(_of_data(name, origin), f"{name[:SHOWN]}…", bounds)
        if scheme == "file":
            return _file(_of_file(name, origin), origin, bounds)
        if "://" in name:
            raise ConfigError(f"{origin}: {name[:200]} is remote; only http and https are fetched, download it first")
        if len(name) > SHORTEST and name.startswith(IN_BASE64):
            return _held(_decoded(name, origin), "image in base64", bounds)
        return _file((self.options.image_root or folder) / name, origin, bounds)

    def _fetched(self, url: str, origin: str, bounds: PixelBounds) -> ImageRef:
        if not self.options.allow_remote:
            raise ConfigError(f"{origin}: {url[:200]} is remote; download it first, or give --allow-remote")
        with self.fetching:  # several threads may want the same one
            if url not in self.known:
                self.known[url] = _held(fetch(url, origin), url, bounds)
        found = self.known[url]
        return ImageRef(url, begin=found.begin, length=found.length, bounds=bounds)


def _held(content: bytes, name: str, bounds: PixelBounds) -> ImageRef:
    begin, length = scratch().put(content)
    return ImageRef(name, begin=begin, length=length, bounds=bounds)


def _file(path: Path, origin: str, bounds: PixelBounds) -> ImageRef:
    try:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"{origin}: image {path} {found}")
    except OSError as error:
        raise ConfigError(f"{origin}: image {str(path)[:200]} cannot be read: {error.strerror}") from None
    return ImageRef(str(path), path.absolute(), bounds=bounds)


def _of_file(url: str, origin: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{origin}: {url} is on the host {parts.netloc}; files are read on this machine alone")
    return Path(url2pathname(parts.path))


def _of_data(url: str, origin: str) -> bytes:
    about, comma, content = url.partition(",")
    if not comma:
        raise ConfigError(f"{origin}: {url[:SHOWN]} is no data address: it has no comma")
    if about.lower().endswith(";base64"):
        return _decoded(content, origin)
    return unquote_to_bytes(content)


def _decoded(text: str, origin: str) -> bytes:
    """The bytes of base64, with or without its line ends and its padding."""
    compact = "".join(unquote_to_bytes(text).decode("ascii", "replace").split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{origin}: an image in base64 is damaged: {error}") from None
