"""Tokenizes conversations with a model's own chat template, tokenizer and image processor.

AutoProcessor is not used: for Qwen2-VL it wants torchvision even for images. The tokenizer and the image
processor alone do the same, with torchvision and without it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.sample import Example, Sample


class ChatEncoder:
    """Expands one placeholder per image to as many tokens as the vision tower will give."""

    def __init__(self, folder: Path, image_token: int, end_token: int) -> None:
        from transformers import AutoTokenizer

        # Before 5.18, what transformers itself calls so wants torchvision.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            # Equal pixels on every machine; and before 5.18, transformers takes the other one without torchvision, too.
            self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: tokenizer or image processor cannot be loaded: {error}") from None
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{folder} has no chat template")
        self.image_token, self.end_token = image_token, end_token

    def __call__(self, sample: Sample, images: Sequence[Image.Image]) -> Example:
        if sample.text is not None:
            ids = self._ids(sample.text)
            return self._example(sample, ids, list(ids), {})
        vision, counts = self._vision(images)
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
        vision, counts = self._vision(images)
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

    def _vision(self, images: Sequence[Image.Image]) -> tuple[Mapping[str, Tensor], list[int]]:
        if not images:
            return {}, []
        out: Any = self.images(list(images), return_tensors="pt")
        counts = out["image_grid_thw"].prod(dim=1) // self.images.merge_size**2
        return {k: out[k] for k in ("pixel_values", "image_grid_thw")}, counts.tolist()

    def _expanded(self, ids: list[int], counts: list[int]) -> list[int]:
        """Consumes a count for every placeholder."""
        expanded = []
        for token in ids:
            expanded += [token] * (counts.pop(0) if token == self.image_token and counts else 1)
        return expanded

    def _answer_labels(self, ids: list[int]) -> list[int]:
        """The answer up to and with its end mark; what the template adds behind it is not predicted."""
        stop = ids.index(self.end_token) + 1 if self.end_token in ids else len(ids)
        return ids[:stop] + [-100] * (len(ids) - stop)

    def _example(self, sample: Sample, ids: list[int], labels: list[int], vision: Mapping[str, Tensor]) -> Example:
        tokens = torch.tensor(ids)
        modality = torch.where(tokens == self.image_token, IMAGE, TEXT).to(torch.int8)
        return Example(sample.index, sample.kind, tokens, torch.tensor(labels), modality, vision)
