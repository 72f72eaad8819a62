"""Reads the turns of a conversation in the forms that people have, and puts images in their places.

An image stands in a message as a part of its own, or beside the conversation with a mark where it belongs: `<image>` in
the text, or a part that says no more than that it is an image. Images without marks go in front of the first question.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import UNBOUNDED, PixelBounds
from qe_dist.data.options import check_bounds
from qe_dist.data.text import check_text

MARK = "<image>"
BOUNDS = ("min_pixels", "max_pixels")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TEXTS, PICTURES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
WHOLE, PIECES = ("image", "image_url", "source"), ("url", "path", "base64", "bytes")
"""Keys of a part that hold an image, and those that together say where it is."""
OF_MESSAGE = ("role", "from", "content", "value", "images", "image")
REFUSED = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), "only images and text are read"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "calls of tools are not read"),
}
"""Keys that change what the model sees, and what is to be said of them."""

Unused = Callable[[str], None]
"""Takes the name of a key that is not used."""
Image = tuple[Any, PixelBounds]
"""What a record has in place of an image, and its bounds."""


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without keys whose value is null: tables have every key in every row."""
    return {key: value for key, value in record.items() if value is not None}


def bounds_of(record: Mapping[str, Any], origin: str) -> PixelBounds:
    """The bounds that a record or a part sets for its images. ConfigError where no image could keep to them."""
    for name in BOUNDS:
        if name in record and (not isinstance(record[name], int) or isinstance(record[name], bool)):
            raise ConfigError(f"{origin}: {name!r} must be a whole number, found {record[name]!r}")
    bounds = PixelBounds(record.get("min_pixels"), record.get("max_pixels"))
    check_bounds(bounds, origin)
    return bounds


def text_of(value: Any, origin: str, what: str) -> str:
    """A text; numbers as they are written. ConfigError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{origin}: {what} must be a text, found {type(value).__name__}")
    return check_text(value, origin)


def listed(value: Any) -> list[Any]:
    return [one for one in value if one is not None] if isinstance(value, list | tuple) else [value]


class Turns:
    """A conversation that is read message by message.

    beside: images of the record whose place is in the conversation. bounds: of those that set none themselves.
    """

    def __init__(self, origin: str, beside: Sequence[Any], bounds: PixelBounds, unused: Unused) -> None:
        self.origin, self.beside, self.bounds, self.unused = origin, list(beside), bounds, unused
        self.marked = False
        self.messages: list[dict[str, Any]] = []
        self.images: list[Image] = []
        """In the order of their parts."""

    def read(self, turns: Any, name: str) -> "Turns":
        """name: what a message calls the list. ConfigError, with the origin in front, for what has no plain meaning."""
        if not isinstance(turns, list) or not turns:
            raise ConfigError(f"{self.origin}: {name!r} must be a list with at least one message")
        for turn in turns:
            if not isinstance(turn, Mapping) or not {"role", "from"} & turn.keys():
                raise ConfigError(f"{self.origin}: every message of {name!r} needs 'role' and 'content'")
        ahead = self._place_images(turns)
        for turn in turns:
            self._message(given(turn), name, ahead if self._role(turn) == "user" else 0)
            ahead = 0 if self._role(turn) == "user" else ahead
        if self.beside:
            raise ConfigError(f"{self.origin}: {len(self.beside)} images, and no message of a user to show them in")
        if all(message["role"] != "assistant" for message in self.messages):
            raise ConfigError(f"{self.origin}: there is no answer (a message with role 'assistant')")
        return self

    def _place_images(self, turns: Sequence[Mapping[str, Any]]) -> int:
        """Decides where the images beside the conversation go. Returns how many go in front of the first question."""
        contents = [turn.get("content", turn.get("value")) for turn in turns]
        parts = [p for c in contents if isinstance(c, list) for p in c if isinstance(p, Mapping)]
        empty = sum(p.get("type") in PICTURES and _image_of(given(p)) is None for p in parts)
        texts = [c for c in contents if isinstance(c, str)] + [
            p["text"] for p in parts if isinstance(p.get("text"), str)
        ]
        marks = 0 if empty else sum(text.count(MARK) for text in texts)
        if self.beside and empty + marks not in (0, len(self.beside)):
            raise ConfigError(f"{self.origin}: {len(self.beside)} images, but {empty + marks} places ({MARK}) for them")
        self.marked = bool(self.beside) and marks > 0
        return len(self.beside) if not empty + marks else 0

    def _role(self, turn: Mapping[str, Any]) -> str:
        said = turn.get("role", turn.get("from"))
        if not isinstance(said, str) or said not in ROLES:
            raise ConfigError(f"{self.origin}: role {said!r} is unknown; known are {', '.join(ROLES)}")
        return ROLES[said]

    def _message(self, turn: Mapping[str, Any], name: str, ahead: int) -> None:
        """ahead: images beside the conversation that are shown before what is said."""
        for key in turn.keys() - set(OF_MESSAGE):
            if key in REFUSED and turn[key]:
                raise ConfigError(f"{self.origin}: a message has {key!r}: {REFUSED[key]}")
            self.unused(f"{name}[].{key}")
        parts = [self._shown(self.beside.pop(0), UNBOUNDED) for _ in range(ahead)]
        for key in ("images", "image"):  # Ollama's
            parts += [self._shown(image, UNBOUNDED) for image in listed(turn.get(key, []))]
        role, content = self._role(turn), turn.get("content", turn.get("value"))
        parts += [one for part in content for one in self._part(part)] if isinstance(content, list) else (
            self._text(text_of(content, self.origin, "'content'"))
        )  # fmt: skip
        said = "".join(part["text"] for part in parts if part["type"] == "text")
        if role == "assistant" and not said.strip():
            raise ConfigError(f"{self.origin}: the answer is empty")
        if role == "user" and not parts:
            raise ConfigError(f"{self.origin}: a message of the user is empty")
        self.messages.append({"role": role, "content": parts})

    def _part(self, part: Any) -> list[dict[str, Any]]:
        if isinstance(part, str):
            return self._text(part)
        own = given(part) if isinstance(part, Mapping) else {}
        if own.get("type") in TEXTS and isinstance(own.get("text"), str):
            self._count_unused(own, ("type", "text"))
            return self._text(own["text"])
        if own.get("type") in PICTURES:
            self._count_unused(own, ("type", *WHOLE, *PIECES, *BOUNDS))
            if (image := _image_of(own)) is None and not self.beside:
                raise ConfigError(f"{self.origin}: there is no image for {str(part)[:80]}")
            return [self._shown(self.beside.pop(0) if image is None else image, bounds_of(own, self.origin))]
        raise ConfigError(
            f"{self.origin}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': path}}, "
            f"found {str(part)[:80]}"
        )

    def _text(self, text: str) -> list[dict[str, Any]]:
        """A text, with an image in place of each mark; a line end beside a mark belongs to the mark."""
        check_text(text, self.origin)
        pieces = text.split(MARK) if self.marked else [text]
        parts: list[dict[str, Any]] = []
        for i, piece in enumerate(pieces):
            said = piece.removeprefix("\n") if i else piece
            said = said.removesuffix("\n") if i < len(pieces) - 1 else said
            parts += [{"type": "text", "text": said}] if said else []
            parts += [self._shown(self.beside.pop(0), UNBOUNDED)] if i < len(pieces) - 1 else []
        return parts

    def _shown(self, image: Any, bounds: PixelBounds) -> dict[str, Any]:
        self.images.append((image, PixelBounds(bounds.least or self.bounds.least, bounds.most or self.bounds.most)))
        return {"type": "image"}

    def _count_unused(self, part: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in part.keys() - set(known):
            self.unused(f"a part's {key}")


def _image_of(part: Mapping[str, Any]) -> Any:
    """What a part has in place of an image; None where it only says that one belongs here."""
    whole = next((part[key] for key in WHOLE if key in part), None)
    return whole or {key: part[key] for key in PIECES if key in part} or None
