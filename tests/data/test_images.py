"""Pixels are those that a viewer shows, whatever form the file has; what is none is refused."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from transformers.image_utils import load_image

from qe_dist.core.errors import ConfigError
from qe_dist.data.images import BAD_PROFILE, FIRST_FRAME, STRETCHED, decode
from tests.tiny import DATA

SCENE = Image.open(DATA / "calibration" / "000.png").convert("RGB")
PIXELS = np.asarray(SCENE)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""EXIF orientation -> what was done to the scene, so that EXIF puts it upright."""


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(content: bytes) -> np.ndarray:
    """As integers that can be subtracted."""
    with warnings.catch_warnings(action="error"):
        image = decode(content, "x")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_puts_pictures_upright_as_transformers_does(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(SCENE.transpose(TURNS[orientation]), kind, exif=exif, lossless=True)
    assert np.array_equal(seen(content), PIXELS)
    (tmp_path / "x").write_bytes(content)
    assert np.array_equal(seen(content), np.asarray(load_image(str(tmp_path / "x"))))


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    content = saved(SCENE, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff")
    assert np.array_equal(seen(content), PIXELS)


LOSSLESS: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(SCENE, "PNG"),
    "bmp": lambda: saved(SCENE, "BMP"),
    "tiff": lambda: saved(SCENE, "TIFF"),
    "webp": lambda: saved(SCENE, "WEBP", lossless=True),
    "palette": lambda: saved(SCENE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "gif": lambda: saved(SCENE, "GIF"),
    "animated": lambda: saved(SCENE, "GIF", save_all=True, append_images=[SCENE.rotate(90)]),
    "pages": lambda: saved(SCENE, "TIFF", save_all=True, append_images=[SCENE.rotate(90)]),
    "opaque": lambda: saved(SCENE.convert("RGBA"), "PNG"),
    "tga": lambda: saved(SCENE, "TGA"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_forms_are_the_scene(name: str) -> None:
    assert np.array_equal(seen(LOSSLESS[name]()), PIXELS)


def test_the_first_of_several_frames_is_taken_and_said() -> None:
    for name in ("animated", "pages", "gif"):
        notes: list[str] = []
        decode(LOSSLESS[name](), "x", notes.append)
        assert notes == ([] if name == "gif" else [FIRST_FRAME])


GRAY = np.asarray(SCENE.convert("L"))
DEEP: dict[str, Image.Image] = {
    "16 bits": Image.fromarray(GRAY.astype(np.uint16) * 257),
    "0 to 255": Image.fromarray(GRAY.astype(np.float32)),
    "0 to 1": Image.fromarray(GRAY.astype(np.float32) / 255),
    "32 bits": Image.fromarray(GRAY.astype(np.int32) * 257),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_values_are_scaled_to_8_bits(name: str) -> None:
    gray = seen(saved(DEEP[name], "TIFF"))
    assert np.array_equal(gray, np.dstack([GRAY] * 3))
    if name == "16 bits":
        assert np.array_equal(seen(saved(DEEP[name], "PNG")), gray)
    wide = Image.fromarray(np.array([[-3.0, 5e4]], np.float32))
    notes: list[str] = []
    assert np.asarray(decode(saved(wide, "TIFF"), "x", notes.append))[0, :, 0].tolist() == [0, 255]
    assert notes == [STRETCHED]
    with pytest.raises(ConfigError, match="x has pixels that are NaN"):
        decode(saved(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF"), "x")


def test_every_form_of_transparency_is_white() -> None:
    """The colour below it, which some programs leave, is not seen."""
    clear = np.all(PIXELS[0, 0] == PIXELS, axis=2)
    expected = np.where(clear[..., None], 255, PIXELS)
    alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    rgba = SCENE.copy()
    rgba.putalpha(alpha)
    palette = SCENE.convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    assert np.array_equal(seen(saved(rgba, "PNG")), expected)
    assert np.array_equal(seen(saved(rgba, "WEBP", lossless=True)), expected)
    assert np.array_equal(seen(saved(palette, "PNG", transparency=index)), expected)
    several = bytes(0 if i == index else 255 for i in range(256))
    assert np.array_equal(seen(saved(palette, "PNG", transparency=several)), expected)
    assert np.array_equal(seen(saved(SCENE, "PNG", transparency=tuple(PIXELS[0, 0].tolist()))), expected)
    gray = Image.fromarray(GRAY)
    in_gray = np.where(GRAY[0, 0] == GRAY, 255, GRAY)
    assert np.array_equal(seen(saved(gray, "PNG", transparency=int(GRAY[0, 0])))[..., 0], in_gray)
    two = Image.merge("LA", (gray, Image.fromarray(np.where(GRAY[0, 0] == GRAY, 0, 255).astype(np.uint8))))
    assert np.array_equal(seen(saved(two, "PNG"))[..., 0], in_gray)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(int(seen(saved(half, "PNG"))[0, 0, 0]) - 127) <= 1


def test_one_bit_and_cmyk() -> None:
    bits = SCENE.convert("1")
    assert np.array_equal(seen(saved(bits, "PNG"))[..., 0], np.asarray(bits.convert("L")))
    assert np.abs(seen(saved(SCENE.convert("CMYK"), "JPEG", quality=100)) - PIXELS).mean() < 2
    assert np.array_equal(seen(saved(SCENE.convert("CMYK"), "TIFF")), PIXELS)


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def wide_gamut() -> bytes:
    """sRGB's profile with red and blue exchanged: what it shows is easily told."""
    content = bytearray(profile("sRGB"))
    count = struct.unpack(">I", content[128:132])[0]
    places = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = (bytes(content[places[name] + 4 : places[name] + 12]) for name in (b"rXYZ", b"bXYZ"))
    content[places[b"rXYZ"] + 4 : places[b"rXYZ"] + 12] = blue
    content[places[b"bXYZ"] + 4 : places[b"bXYZ"] + 12] = red
    return bytes(content).replace(b"s\0R\0G\0B", b"m\0i\0n\0e").replace(b"\0s\0R\0G\0B", b"\0m\0i\0n\0e")


def test_profiles_become_srgb() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert seen(saved(red, "PNG", icc_profile=profile("sRGB")))[0, 0].tolist() == [255, 0, 0]
    shown = seen(saved(red, "PNG", icc_profile=wide_gamut()))[0, 0]
    assert shown[2] > 240
    assert shown[0] < 40
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert seen(saved(clear, "PNG", icc_profile=wide_gamut()))[0, 0].tolist() == [255, 255, 255]
    for bad in (b"no profile", wide_gamut()[:200]):
        notes: list[str] = []
        assert decode(saved(red, "PNG", icc_profile=bad), "x", notes.append).getpixel((0, 0)) == (255, 0, 0)
        assert notes == [BAD_PROFILE]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_what_breaks_off_is_refused(kind: str) -> None:
    whole = saved(SCENE, kind)
    with pytest.raises(ConfigError, match=r"x is (damaged|not an image)"):
        decode(whole[: len(whole) * 2 // 3], "x")


def test_what_is_no_image_is_refused_with_the_reason(tmp_path: Path) -> None:
    heif = b"\0\0\0\x18ftypheic\0\0\0\0"
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    for content, reason in (
        (b"", "is empty"),
        (heif, "HEIF, save it as JPEG"),
        (eps, "known are PNG"),
        (b"no", "known"),
    ):
        with pytest.raises(ConfigError, match=f"x is not an image.*{reason}"):
            decode(content, "x")
    (tmp_path / "x").write_bytes(heif)
    with pytest.raises(ConfigError, match="it is HEIF"):
        decode(tmp_path / "x", "x")


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "says"), [(9000, "more than 64,000,000: scale it down"), (100_000, "is too large")])
def test_bombs_are_refused_by_their_header(side: int, says: str) -> None:
    with pytest.raises(ConfigError, match=f"x .*{says}"):
        decode(bomb(side, side), "x")


FORMS = (*(LOSSLESS[name]() for name in ("png", "gif", "tiff", "webp")), saved(SCENE, "JPEG"))


@given(
    st.sampled_from(FORMS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0.01, 1)
)
def test_damaged_files_are_a_picture_or_one_error(
    content: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    with contextlib.suppress(ConfigError):
        assert decode(bytes(damaged[: int(kept * len(damaged))]), "x").mode == "RGB"
