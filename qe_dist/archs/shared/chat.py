"""Tokenizes conversations with a model's own chat template, tokenizer and image processor.

AutoProcessor is not used: for Qwen2-VL it wants torchvision even for images. The tokenizer and the image
processor alone do the same, with torchvision and without it.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qe_dist.archs.base import ImageReader
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.sample import Example, Sample


class ChatEncoder:
    """Expands one placeholder per image to as many tokens as the vision tower will give.

    images: None for a model of text only. end_tokens: each of them ends an answer.
    """

    def __init__(self, folder: Path, images: ImageReader | None, end_tokens: Collection[int]) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: tokenizer cannot be loaded: {error}") from None
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{folder} has no chat template")
        self.images, self.end_tokens = images, end_tokens

    def __call__(self, sample: Sample, images: Sequence[Image.Image]) -> Example:
        if sample.text is not None:
            ids = self._ids(sample.text)
            return self._example(sample, ids, list(ids), {})
        vision, counts = self._vision(sample, images)
        ids, labels = [], []
        for text, is_answer in self._segments(sample):
            part = self._expanded(self._ids(text), counts)
            ids += part
            labels += self._answer_labels(part) if is_answer else [-100] * len(part)
        if counts:
            raise ConfigError(f"{sample.origin}: the chat template left out {len(counts)} images")
        return self._example(sample, ids, labels, vision)

    def prompt(self, sample: Sample, images: Sequence[Image.Image]) -> Example:
        """Everything before the last answer, ready for generation."""
        vision, counts = self._vision(sample, images)
        last = max(i for i, m in enumerate(sample.messages) if m["role"] == "assistant")
        ids = self._expanded(self._ids(self._render(sample, last, prompt=True)), counts)
        return self._example(sample, ids, [-100] * len(ids), vision)

    def _segments(self, sample: Sample) -> list[tuple[str, bool]]:
        """The rendered conversation, cut where an answer begins or ends."""
        done, segments = "", []
        for i, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            question = self._render(sample, i, prompt=True)
            answered = self._render(sample, i + 1, prompt=False)
            if not (question.startswith(done) and answered.startswith(question)):
                raise ConfigError(f"{sample.origin}: the chat template rewrites earlier turns")
            segments += [(question[len(done) :], False), (answered[len(question) :], True)]
            done = answered
        return segments

    def _render(self, sample: Sample, count: int, prompt: bool) -> str:
        messages = [dict(m) for m in sample.messages[:count]]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _vision(self, sample: Sample, images: Sequence[Image.Image]) -> tuple[Mapping[str, Tensor], list[int]]:
        if not images:
            return {}, []
        if self.images is None:
            raise ConfigError(f"{sample.origin} has images, but the model is one of text only")
        return self.images(images)

    def _expanded(self, ids: list[int], counts: list[int]) -> list[int]:
        """Consumes a count for every placeholder."""
        expanded = []
        for token in ids:
            expanded += [token] * (counts.pop(0) if counts and self._is_image(token) else 1)
        return expanded

    def _is_image(self, token: int) -> bool:
        return self.images is not None and token == self.images.token

    def _answer_labels(self, ids: list[int]) -> list[int]:
        """The answer up to and with its end mark; what the template adds behind it is not predicted."""
        stop = next((i + 1 for i, token in enumerate(ids) if token in self.end_tokens), len(ids))
        return ids[:stop] + [-100] * (len(ids) - stop)

    def _example(self, sample: Sample, ids: list[int], labels: list[int], vision: Mapping[str, Tensor]) -> Example:
        modality = torch.tensor([IMAGE if self._is_image(token) else TEXT for token in ids], dtype=torch.int8)
        return Example(sample.index, sample.kind, torch.tensor(ids), torch.tensor(labels), modality, vision)
