"""What the served checkpoints are made from, and asked."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "models" / "outlier", ROOT / "models" / "data"
RECIPES = ("qe-w4a16g64", "qe-w4a8", "qe-w4a6", "rtn-w4a8", "qe-extract-w4a6")
QUESTIONS, STORIES = 200, 20


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    image: str | None


def prompts() -> list[Question]:
    """Questions about images, then beginnings of stories."""
    rows = [json.loads(line) for line in (DATA / "evaluation.jsonl").read_text().splitlines()]
    mark = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    asked = [Question(mark.format(r["prompt"]), r["answer"], str(DATA / r["image"])) for r in rows if "image" in r]
    begun = [Question(r["text"][: len(r["text"]) // 2], "", None) for r in rows if "text" in r]
    return [*asked[:QUESTIONS], *begun[:STORIES]]
