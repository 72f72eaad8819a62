"""What transformers says of answers that vLLM gave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist.serve.loading import load_model
from tests.vllm.questions import Question


class Twin:
    """transformers with the same checkpoint. What it says to a text is kept: one rank and two mostly say the same."""

    def __init__(self, checkpoint: Path) -> None:
        self.folder, self.model = checkpoint, load_model(checkpoint)
        self.told: dict[tuple[Question, tuple[int, ...]], Tensor] = {}

    def compare(self, asked: Sequence[Question], given: Sequence[dict[str, Any]]) -> tuple[list[bool], Tensor]:
        """Of each answer, whether transformers would have given it; of each token, how far its logprob is off."""
        same, off = [], []
        for question, answer in zip(asked, given, strict=True):
            key = (question, tuple(answer["tokens"]))
            told = self.told[key] if key in self.told else self.told.setdefault(key, self._logprobs(question, answer))
            tokens = torch.tensor(answer["tokens"])
            same.append(bool((told.argmax(dim=-1) == tokens).all()))
            off.append((told.gather(1, tokens[:, None])[:, 0] - torch.tensor(answer["logprobs"])).abs())
        return same, torch.cat(off)

    @torch.no_grad()
    def _logprobs(self, question: Question, answer: dict[str, Any]) -> Tensor:
        """Of the whole vocabulary, where each token of the answer was chosen. [tokens, vocabulary]"""
        ids = torch.tensor([answer["prompt"] + answer["tokens"]])
        vision = {} if question.image is None else self._seen(question.image, ids)
        logits = self.model(input_ids=ids, **vision).logits[0, len(answer["prompt"]) - 1 : -1]
        return torch.log_softmax(logits.float(), dim=-1)

    def _seen(self, path: str, ids: Tensor) -> dict[str, Tensor]:
        from PIL import Image
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self.folder)
        seen = processor([Image.open(path).convert("RGB")], return_tensors="pt")
        vision = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
        return vision | {"mm_token_type_ids": (ids == self.model.config.image_token_id).int()}


def accuracy(asked: list[Question], given: list[dict[str, Any]]) -> float:
    pairs = [(q.answer, a["text"].strip()) for q, a in zip(asked, given, strict=True) if q.answer]
    return sum(wanted == got for wanted, got in pairs) / len(pairs)
