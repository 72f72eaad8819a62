"""Makes calibration data of your own: from a folder of images, each with its caption in a text file of the same name.

    python examples/calibration.py FOLDER OUTPUT.jsonl

cat.png and cat.txt become {"image": "cat.png", "prompt": ..., "answer": "what cat.txt says"}.
"""

import json
import sys
from pathlib import Path

from qe_dist.data.samples import read_samples

PROMPT = "Describe the image."
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def main(folder: str, output: str) -> None:
    lines = [
        json.dumps({"image": str(image.resolve()), "prompt": PROMPT, "answer": caption.read_text().strip()})
        for image in sorted(Path(folder).iterdir())
        if image.suffix.lower() in ENDINGS and (caption := image.with_suffix(".txt")).exists()
    ]
    Path(output).write_text("\n".join(lines) + "\n")
    samples = read_samples(Path(output))  # an image that is damaged or an empty caption is named here
    print(f"{output}: {len(samples)} samples, {sum(len(sample.images) for sample in samples)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
