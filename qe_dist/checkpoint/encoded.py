"""The samples of a file as a model's tokenizer and image processor see them, made when they are asked for."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qe_dist import archs
from qe_dist.archs.base import Encoder, Family
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Example, Sample
from qe_dist.data.options import PLAIN, ReadOptions
from qe_dist.data.samples import carried, load_images, read
from qe_dist.io.checkpoint import MANIFEST, read_manifest
from qe_dist.io.weights import SafetensorsSource

ENCODING_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "additional_chat_templates/default.jinja",
)  # fmt: skip


class EncodedSamples(Sequence[Example]):
    """Keeps no pixel: an image is decoded each time its sample is asked for. Travels to other processes as its samples
    and the model's folder.

    The first pass, here, encodes every sample once, so that what is wrong with one is said before any work.
    """

    def __init__(self, folder: Path, data: Path | str, options: ReadOptions = PLAIN) -> None:
        self.folder = folder
        found = read(data, options, self._encoder)
        self.samples, self.lengths, self.notes = found.samples, tuple(found.lengths), found.notes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.samples[index]
        return self._encode(chosen) if isinstance(chosen, Sample) else [self._encode(one) for one in chosen]

    def _encode(self, sample: Sample) -> Example:
        return self._encoder(sample, load_images(sample))

    @cached_property
    def arch(self) -> Family:
        return archs.for_checkpoint(read_config(self.folder))

    @cached_property
    def _encoder(self) -> Encoder:
        return self.arch.encoder(self.folder)

    def __reduce__(self) -> Any:
        return _restored, (self.folder, [carried(sample) for sample in self.samples], self.lengths)


def _restored(folder: Path, samples: list[Sample], lengths: tuple[int, ...]) -> EncodedSamples:
    made = EncodedSamples.__new__(EncodedSamples)
    made.folder, made.samples, made.lengths, made.notes = folder, samples, lengths, []
    return made


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Tokens of each, without making those that are made when they are asked for."""
    if isinstance(examples, EncodedSamples):
        return examples.lengths
    return [example.input_ids.numel() for example in examples]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model or a checkpoint. ConfigError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no config.json; give a model or a finished checkpoint")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def check_comparable(examples: EncodedSamples, reference: Path) -> None:
    """ConfigError where the reference reads the samples differently, or is another model than the one that the
    checkpoint was made from, so that a divergence from it would mean nothing."""
    mine, theirs = examples.folder, reference
    config, other = read_config(mine), read_config(theirs)
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        found, wanted = (_setting(one, name) for one in (config, other))
        if found != wanted:
            raise ConfigError(f"{mine} has {name} {found} and the reference {theirs} {wanted}; these are two models")
    if "quantization_config" not in other and (mine / MANIFEST).exists():
        made_from, fingerprint = read_manifest(mine).run["model"], SafetensorsSource(theirs).fingerprint()
        if made_from != fingerprint:
            raise ConfigError(
                f"{mine} was made from another model than {theirs}: its manifest names {made_from}, this is "
                f"{fingerprint}; give the model that was quantized"
            )
    if any(_text(mine, name) != _text(theirs, name) for name in ENCODING_FILES):
        _check_same_ids(examples, theirs)


def _check_same_ids(examples: EncodedSamples, reference: Path) -> None:
    """Files that differ may still say the same (another version of transformers wrote them): what counts is ids."""
    other = examples.arch.encoder(reference)
    for sample, one in zip(examples.samples, examples, strict=True):
        there = other(sample, load_images(sample))
        if one.input_ids.tolist() != there.input_ids.tolist() or one.labels.tolist() != there.labels.tolist():
            raise ConfigError(
                f"{sample.origin}: {examples.folder} and {reference} make different tokens of this sample; both must "
                f"have the same tokenizer and chat template (compare {', '.join(ENCODING_FILES)})"
            )


def _setting(config: dict[str, Any], name: str) -> Any:
    """Published configs have the text model's settings at the top, newer ones in `text_config`."""
    return config.get("text_config", {}).get(name, config.get(name))


def _text(folder: Path, name: str) -> str | None:
    path = folder / name
    return path.read_text() if path.is_file() else None
