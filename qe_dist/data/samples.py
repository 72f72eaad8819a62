"""Calibration and evaluation files: JSON lines, local images only, every fault named by file and line.

A line is {"messages": [...]} in the Hugging Face chat form with {"type": "image", "image": "path"} parts,
or short {"image": ..., "prompt": ..., "answer": ...}, or {"text": ...}. Paths are relative to the file.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import ImageRef, Sample

MAX_PIXELS = 64_000_000
"""Pixels of one image at most; anything larger is taken for a decompression bomb."""


def read_samples(path: Path) -> list[Sample]:
    """All samples of a file. Every image is decoded once, to find damaged ones now; none is kept."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected a JSON-lines file of samples")
    samples: list[Sample] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                samples.append(_sample(line, len(samples), f"{path}:{number}", path.parent))
    if not samples:
        raise ConfigError(f"{path} has no usable sample; expected at least one JSON line")
    return samples


def _sample(line: str, index: int, origin: str, folder: Path) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}: broken JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{origin}: expected a JSON object, found {type(record).__name__}")
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{origin}: 'text' is empty")
        return Sample(index, origin, "text", text=text)
    if "messages" in record:
        messages = _normalized(record["messages"], origin)
    elif {"prompt", "answer"} <= record.keys():
        messages = _from_short(record, origin)
    else:
        raise ConfigError(f"{origin}: expected 'messages', 'text', or 'prompt' and 'answer'; found {sorted(record)}")
    names = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    paths = [_image_path(name, origin, folder) for name in names]
    # A damaged image should stop the run now, not at its batch.
    images = tuple(ImageRef(str(path), path, size=_decoded(path, origin).size) for path in paths)
    kind = str(record.get("kind", "image" if images else "chat"))
    return Sample(index, origin, kind, messages=tuple(messages), images=images)


def _from_short(record: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": record["prompt"]}]
    if "image" in record:
        content.insert(0, {"type": "image", "image": record["image"]})
    answer = [{"type": "text", "text": record["answer"]}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return _normalized(turns, origin)


def _normalized(messages: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{origin}: 'messages' must be a list with at least one message")
    result = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ConfigError(f"{origin}: every message needs 'role' and 'content'")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ConfigError(f"{origin}: 'content' must be text or a list of parts")
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image") or not isinstance(part.get(kind), str):
                raise ConfigError(
                    f"{origin}: a part must be {{'type': 'text', 'text': ...}} or "
                    f"{{'type': 'image', 'image': path}}, found {str(part)[:80]}"
                )
        said = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "assistant" and not said.strip():
            raise ConfigError(f"{origin}: the answer is empty")
        result.append({"role": message["role"], "content": parts})
    if all(message["role"] != "assistant" for message in result):
        raise ConfigError(f"{origin}: there is no answer (a message with role 'assistant')")
    return result


def _image_path(name: str, origin: str, folder: Path) -> Path:
    if "://" in name:
        raise ConfigError(f"{origin}: {name} is remote; only local images are read, download it first")
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{origin}: image {path} does not exist")
    return path


def _opened(path: Path, origin: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{origin}: {path} is too large ({error})") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{origin}: {path} is not an image ({error})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ConfigError(f"{origin}: {path} has {width}x{height} pixels, more than {MAX_PIXELS}; scale it down")
    return image


def _decoded(path: Path, origin: str) -> Image.Image:
    with _opened(path, origin) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{origin}: {path} is damaged ({error})") from None


def load_images(sample: Sample) -> list[Image.Image]:
    """The decoded images of a sample, RGB."""
    paths = [image.path for image in sample.images if image.path is not None]
    assert len(paths) == len(sample.images), "every image of a JSON-lines file is a file"
    return [_decoded(path, sample.origin) for path in paths]
