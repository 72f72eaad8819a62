"""The final hidden states of a reference model at the tokens that it predicts, and its head, on disk.

Each FOLDER/states-00000.safetensors holds some samples, and each head-00000.safetensors consecutive rows of the head.
states.json says which file holds which sample. It is published last, so a folder with it is complete.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qe_dist.core.errors import CheckpointError
from qe_dist.io.publish import publish_json, publish_tensors, read_json

CONTENTS = "states.json"


class StatesWriter:
    """Writes the states of one model, some samples at a time, and then its head."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, int] = {}
        self.files = 0

    def put(self, states: Mapping[int, Tensor]) -> None:
        """states: by index of the sample, [P, D] for P predicted tokens."""
        publish_tensors(_file(self.folder, "states", self.files), {str(i): t for i, t in states.items()})
        self.places |= dict.fromkeys(map(str, states), self.files)
        self.files += 1

    def finish(self, head: Iterator[Tensor]) -> None:
        """Writes the head and the table of contents.

        head: slices of its rows. They are stored in bf16 when that is exact.
        """
        vocabulary = width = count = 0
        for rows in head:
            publish_tensors(_file(self.folder, "head", count), {"weight": _compact(rows)})
            vocabulary, width, count = vocabulary + len(rows), rows.shape[1], count + 1
        said = {"vocabulary": vocabulary, "width": width, "slices": count, "samples": self.places}
        publish_json(self.folder / CONTENTS, said)


class States:
    """Reads what a StatesWriter wrote. Raises CheckpointError for a file that is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        said = read_json(folder / CONTENTS)
        self.vocabulary, self.width, self.slices = said["vocabulary"], said["width"], said["slices"]
        self.places = {int(i): file for i, file in said["samples"].items()}

    def get(self, index: int) -> Tensor:
        """The states of a sample. [P, D]"""
        if index not in self.places:
            raise CheckpointError(f"{self.folder} has no states of sample {index}; it was made from other samples")
        return _read(_file(self.folder, "states", self.places[index]), str(index))

    def head(self) -> Iterator[Tensor]:
        """Slices of the rows of the head, each read when it is yielded."""
        for i in range(self.slices):
            yield _read(_file(self.folder, "head", i), "weight")


def _file(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}-{index:05d}.safetensors"


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _compact(rows: Tensor) -> Tensor:
    short = rows.to(torch.bfloat16)
    return short if torch.equal(short.to(rows.dtype), rows) else rows
