"""Finds the chat template of a folder as transformers does, and keeps apart from its marks what a person typed."""

import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from qe_dist.core.errors import CheckpointError

PLACES = (
    "chat_template.jinja, additional_chat_templates/, chat_template.json, processor_config.json or "
    "tokenizer_config.json"
)
BEGIN, END = "\U000f0000", "\U000f0001"
"""Characters for private use, around what a person typed that would otherwise be a special token."""


def find_template(folder: Path, tokenizer: Any, has_images: bool) -> str:
    """The template that transformers' processor of the model renders; that of the tokenizer where the model is one of
    text only, or its processor has none.

    Raises CheckpointError where there is none, or several and none of them is named `default`.
    """
    found = (_of_processor(folder) if has_images else None) or tokenizer.chat_template
    if not found:
        raise CheckpointError(
            f"{folder} has no chat template in {PLACES}; copy the one of the model's instruction-tuned version"
        )
    if isinstance(found, str):
        return found
    if "default" not in found:
        raise CheckpointError(
            f"{folder} has the chat templates {', '.join(sorted(found))}, and none is named default; rename one"
        )
    default: str = found["default"]
    return default


def _of_processor(folder: Path) -> Any:
    from transformers.processing_utils import ProcessorMixin

    try:
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves files to be collected
            settings, _ = ProcessorMixin.get_processor_dict(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the chat template cannot be read: {error}") from None
    return settings.get("chat_template")


class TypedTokens:
    """Special tokens in what a person said are text, as `sanitize_control_tokens` of newer transformers has them. A
    plain text may be a conversation that was rendered before: there, placeholders of images alone are text.

    placeholders: tokens that stand for parts of images or videos.
    """

    def __init__(self, tokenizer: Any, placeholders: Collection[int]) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()
        added = tokenizer.added_tokens_decoder.items()
        pictures = {token.content for index, token in added if index in placeholders}
        self._special = _any_of(pictures | {token.content for _, token in added if token.special})
        self._pictures = _any_of(pictures)
        self._marks = re.compile(f"{BEGIN}({self._special.pattern}){END}|[{BEGIN}{END}]")

    def said(self, text: str) -> str:
        """What a person said, with marks around what reads like a special token."""
        return self._marked(self._special, text)

    def plain(self, text: str) -> str:
        """A plain text, with marks around what reads like a placeholder."""
        return self._marked(self._pictures, text)

    def _marked(self, tokens: re.Pattern[str], text: str) -> str:
        return tokens.sub(f"{BEGIN}\\g<0>{END}", text.replace(BEGIN, "").replace(END, ""))

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered text; those between marks as the plain text that they are.

        Raises ValueError for a token that the tokenizer makes of plain text, too.
        """
        pieces = self._marks.split(text)
        return [index for i, piece in enumerate(pieces) if piece for index in self._piece(piece, typed=i % 2 == 1)]

    def _piece(self, piece: str, typed: bool) -> Iterator[int]:
        with self._lock:  # the tokenizer remembers `typed`, so threads would change it for each other
            ids = self._tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=typed)
        if typed and self._tokenizer.convert_tokens_to_ids(piece) in ids:
            raise ValueError(f"the tokenizer cannot read {piece!r} as plain text; write it in another way")
        yield from ids


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """The longest of them that fits; of none, a pattern that fits nowhere."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or "(?!)")
