"""What the served checkpoints are made from, and asked."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "models" / "outlier", ROOT / "models" / "data"
ONE_RANK = "gptq+qera-w4a6k64@0.25f4"
"""Its dynamic outlier channels would depend on the number of ranks."""
ROTATED = "hadamard+gptq+qera-w4a16@0.45f4"
"""`qe` below 8 bits rotates. Where activations are rounded, too, the last bit of a sum decides too much for a close
comparison: all channels of a rotated token are about equally large, and reach the next step of a grid together."""
CUT = {ROTATED: 2}
"""Ranks that a recipe has to be quantized for, else one will do."""
RECIPES = ("qe-w4a16g64", "qe-w4a8", ONE_RANK, "rtn-w4a8", "qe-extract-w4a8", ROTATED)
WIDE = "rtn-w4a16g128"
"""Its scale groups cannot be cut over two ranks."""
QUESTIONS, STORIES = 200, 20
EQUAL = 0.98
"""Share of the answers to questions that must be equal, token by token."""


@dataclass(frozen=True)
class Question:
    prompt: str
    text: str
    """The prompt without its template."""
    answer: str
    image: str | None


def prompts() -> list[Question]:
    """Questions about images, then beginnings of stories."""
    rows = [json.loads(line) for line in (DATA / "evaluation.jsonl").read_text().splitlines()]
    mark = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    images = [row for row in rows if "image" in row][:QUESTIONS]
    begun = [row["text"][: len(row["text"]) // 2] for row in rows if "text" in row][:STORIES]
    asked = [Question(mark.format(r["prompt"]), r["prompt"], r["answer"], str(DATA / r["image"])) for r in images]
    return asked + [Question(text, text, "", None) for text in begun]
