"""Decodes images as a viewer shows them: upright, on white, in 8 bits of sRGB. Every path of the project comes here."""

import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from qe_dist.core.errors import ConfigError

MAX_PIXELS = 64_000_000
"""Most pixels of one image; anything larger is taken for a decompression bomb."""
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX", "QOI", "SGI",
)  # fmt: skip
"""Those that hold pixels alone. EPS, which PIL knows too, is a program that Ghostscript runs."""
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
    ".ico", ".tga", ".pcx", ".qoi",
)  # fmt: skip
FIRST_FRAME = "images of several frames or pages, of which the first is taken"
BAD_PROFILE = "images whose colour profile cannot be used and is ignored"
STRETCHED = "images whose values are in no known range and are stretched from black to white"
HEIF = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")

Note = Callable[[str], None]
"""Takes what is to be said of an image."""


def decode(content: Path | bytes, named: str, note: Note = lambda _: None) -> Image.Image:
    """The image in RGB, as a viewer shows it. note: is given a line for each thing that is not as it is in the file.

    Raises ConfigError, with `named` in front, for what is no image, is damaged, breaks off, or is too large.
    """
    with warnings.catch_warnings(action="ignore"):  # what PIL warns of is decided here
        image = _opened(content, named)
        try:
            with image:
                image.load()
                if image.format != "MPO" and _frames(image) > 1:  # a phone's MPO has a preview behind its picture
                    note(FIRST_FRAME)
                return _on_white(_upright(image), named, note)
        except ConfigError:
            raise
        except Exception as error:  # PIL's readers raise anything where a file is damaged
            raise ConfigError(f"{named} is damaged ({error})") from None


def _frames(image: Any) -> int:
    """Formats of one image have no such attribute."""
    return image.n_frames if hasattr(image, "n_frames") else 1


def _opened(content: Path | bytes, named: str) -> Image.Image:
    try:
        image = Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{named} is too large ({error})") from None
    except Exception as error:  # as above
        raise ConfigError(f"{named} is not an image{_why(content, error)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ConfigError(f"{named} has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down")
    return image


def _why(content: Path | bytes, error: Exception) -> str:
    if isinstance(content, Path):
        try:
            with content.open("rb") as file:
                content = file.read(16)
        except OSError as unreadable:
            return f": it cannot be read ({unreadable.strerror})"
    if content[4:8] == b"ftyp" and content[8:12] in HEIF:
        return " of a known format: it is HEIF, save it as JPEG or PNG"
    return (
        " that is empty"
        if not content
        else f" of a known format ({type(error).__name__}); known are {FORMATS[0]}, " + (", ".join(FORMATS[1:]))
    )


def _upright(image: Image.Image) -> Image.Image:
    """Returns the picture as EXIF rotates and mirrors it, or as it is where EXIF is damaged, as viewers do."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # PIL reads EXIF without checks
        return image.copy()


def _on_white(image: Image.Image, named: str, note: Note) -> Image.Image:
    colour, alpha = _layers(image, named, note)
    rgb = _srgb(colour, image.info.get("icc_profile"), note)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, (255, 255, 255))
    white.paste(rgb, mask=alpha)
    return white


def _layers(image: Image.Image, named: str, note: Note) -> tuple[Image.Image, Image.Image | None]:
    """Colours in 8 bits, and how opaque they are."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        clear = image.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(_eight_bits(values, image.mode, named, note)), alpha
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "PA" or (image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        *_, alpha = image.split()
        return image.convert({"LA": "L", "RGBA": "RGB"}[image.mode]), alpha
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB"), None


def _eight_bits(values: np.ndarray, mode: str, named: str, note: Note) -> np.ndarray:
    """16-bit values scaled, floating-point ones by their range: 0 to 1, or 0 to 255."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ConfigError(f"{named} has pixels that are NaN or infinite")
    if mode.startswith("I;16"):
        top = 65535.0
    else:
        top = next((top for top in ((1.0,) if mode == "F" else ()) + (255.0, 65535.0) if high <= top), 0.0)
    if low < 0 or not top:
        note(STRETCHED)
        values, top = values.astype(np.float64) - low, (high - low) or 1.0
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


@cache
def _profile_of_srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def _srgb(image: Image.Image, profile: bytes | None, note: Note) -> Image.Image:
    """In sRGB, by the profile of the file; sRGB and no profile change nothing."""
    if image.mode == "LAB":
        return _transformed(image, ImageCms.createProfile("LAB"))
    if not profile:
        return image.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return image.convert("RGB")
        return _transformed(image, own)
    except (ImageCms.PyCMSError, OSError):
        note(BAD_PROFILE)
        return image.convert("RGB")


def _transformed(image: Image.Image, profile: Any) -> Image.Image:
    return ImageCms.buildTransform(profile, _profile_of_srgb(), image.mode, "RGB").apply(image)
