"""Tokenizes conversations with a model's own chat template, tokenizer and image processor.

AutoProcessor is not used: for Qwen2-VL it wants torchvision even for images. The tokenizer and the image
processor alone do the same, with torchvision and without it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from torch import Tensor

from qe_dist.archs.base import ImageReader
from qe_dist.archs.shared.template import TypedTokens, find_template
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.sample import Example, Sample

TO_SHORTEN = "shorten it, or let --skip-bad leave such samples out"


class ChatEncoder:
    """Expands one placeholder per image to as many tokens as the vision tower will give.

    images: None for a model of text only. placeholders: tokens that stand for parts of images or videos. end_tokens:
    each of them ends an answer. context: most tokens of a sample.

    A text that is longer is cut at its end. A longer conversation is cut behind its last answer that fits; where that
    would leave no answer, or leave out an image, it is refused.
    """

    def __init__(
        self,
        folder: Path,
        images: ImageReader | None,
        placeholders: Collection[int],
        end_tokens: Collection[int],
        context: int,
    ) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: tokenizer cannot be loaded: {error}") from None
        self.template = find_template(folder, self.tokenizer, images is not None)
        self.typed = TypedTokens(self.tokenizer, placeholders)
        self.folder, self.images, self.end_tokens, self.context = folder, images, end_tokens, context

    def __call__(self, sample: Sample, images: Sequence[Image.Image]) -> Example:
        """Raises ConfigError, which names the sample, where it cannot be fed to the model."""
        if sample.text is not None:
            ids = self._ids(sample, self.typed.plain(sample.text))
            whole = ids[: self.context]
            return self._example(sample, whole, list(whole), {}, len(ids) - len(whole))
        vision, counts = self._vision(sample, images)
        ids, labels, ends = [], [], []
        for text, is_answer in self._segments(sample):
            part = self._expanded(sample, self._ids(sample, text), counts)
            ids += part
            labels += self._answer_labels(part) if is_answer else [-100] * len(part)
            ends += [len(ids)] if is_answer else []
        if counts:
            raise ConfigError(f"{sample.origin}: the chat template left out {len(counts)} images")
        kept = self._room(sample, ids, ends)
        return self._example(sample, ids[:kept], labels[:kept], vision, len(ids) - kept)

    def prompt(self, sample: Sample, images: Sequence[Image.Image]) -> Example:
        """Everything before the last answer, ready for generation."""
        vision, counts = self._vision(sample, images)
        last = max(i for i, m in enumerate(sample.messages) if m["role"] == "assistant")
        ids = self._expanded(sample, self._ids(sample, self.rendered(sample, last, prompt=True)), counts)
        return self._example(sample, ids, [-100] * len(ids), vision)

    def rendered(self, sample: Sample, count: int, prompt: bool) -> str:
        """The first messages as the chat template puts them. prompt: with the beginning of an answer."""
        messages = [{"role": m["role"], "content": self._content(m)} for m in sample.messages[:count]]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{self.folder}: the chat template is broken: {error}, line {error.lineno}") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{sample.origin}: the model's chat template refuses the sample: {error}") from None
        assert isinstance(text, str), "it is asked for no tokens"
        return text

    def _content(self, message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        """Parts, as templates of models with images go through them; text alone, as templates of the others have it."""
        parts = [p | {"text": self.typed.said(p["text"])} if p["type"] == "text" else p for p in message["content"]]
        return parts if self.images is not None else "".join(part["text"] for part in parts)

    def _segments(self, sample: Sample) -> Iterator[tuple[str, bool]]:
        """The rendered conversation, cut where an answer begins or ends."""
        done = ""
        for i, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            question = self.rendered(sample, i, prompt=True)
            answered = self.rendered(sample, i + 1, prompt=False)
            if not (question.startswith(done) and answered.startswith(question)):
                raise ConfigError(f"{sample.origin}: the chat template rewrites earlier turns")
            yield question[len(done) :], False
            yield answered[len(question) :], True
            done = answered
        if sample.messages[-1]["role"] != "assistant":
            yield self.rendered(sample, len(sample.messages), prompt=False)[len(done) :], False

    def _ids(self, sample: Sample, text: str) -> list[int]:
        try:
            return self.typed.ids(text)
        except ValueError as error:
            raise ConfigError(f"{sample.origin}: {error}") from None

    def _vision(self, sample: Sample, images: Sequence[Image.Image]) -> tuple[Mapping[str, Tensor], list[int]]:
        if not images:
            return {}, []
        if self.images is None:
            raise ConfigError(f"{sample.origin} has images, but {self.folder} is a model of text only")
        try:
            return self.images(images, [image.bounds for image in sample.images])
        except ValueError as error:
            names = ", ".join(image.name for image in sample.images)
            raise ConfigError(f"{sample.origin}: the model's image processor refuses {names}: {error}") from None

    def _expanded(self, sample: Sample, ids: list[int], counts: list[int]) -> list[int]:
        """Consumes a count for every placeholder."""
        expanded = []
        for token in ids:
            if self._is_image(token) and not counts:
                raise ConfigError(f"{sample.origin}: the chat template shows more images than the sample has")
            expanded += [token] * (counts.pop(0) if self._is_image(token) else 1)
        return expanded

    def _room(self, sample: Sample, ids: Sequence[int], ends: Sequence[int]) -> int:
        """Tokens that are kept of a conversation whose answers have these ends."""
        if len(ids) <= self.context:
            return len(ids)
        kept = max((end for end in ends if end <= self.context), default=0)
        if not kept or any(self._is_image(token) for token in ids[kept:]):
            lost = "an image" if kept else "its first answer"
            raise ConfigError(
                f"{sample.origin}: {len(ids)} tokens, of which the model's context has {self.context}; that would cut "
                f"off {lost}: {TO_SHORTEN}"
            )
        return kept

    def _is_image(self, token: int) -> bool:
        return self.images is not None and token == self.images.token

    def _answer_labels(self, ids: list[int]) -> list[int]:
        """The answer up to and with its end mark; what the template adds behind it is not predicted."""
        stop = next((i + 1 for i, token in enumerate(ids) if token in self.end_tokens), len(ids))
        return ids[:stop] + [-100] * (len(ids) - stop)

    def _example(
        self, sample: Sample, ids: list[int], labels: list[int], vision: Mapping[str, Tensor], cut: int = 0
    ) -> Example:
        modality = torch.tensor([IMAGE if self._is_image(token) else TEXT for token in ids], dtype=torch.int8)
        return Example(sample.index, sample.kind, torch.tensor(ids), torch.tensor(labels), modality, vision, cut)
