"""From a checkpoint of ours to one that engines read which know nothing of us, file by file.

The output appears all at once: it is made under a temporary name, and renamed when everything is there.
"""

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.checkpoint.compressed_tensors import (
    ExportedBlock,
    LinearFormat,
    exported_block,
    lora_tensors,
    losses,
    why_not,
)
from qe_dist.checkpoint.verify import Checkpoint
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.layout import FORMAT, GroupLayout
from qe_dist.io.checkpoint import COPIED, INDEX
from qe_dist.io.publish import (
    cannot_write,
    make_folder,
    publish,
    publish_json,
    publish_one_by_one,
    publish_tensors,
    sha256,
)

ADAPTER = "adapter"
REPORT = "qe_export.json"
CARD = "README.md"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's --max-lora-rank takes."""


@dataclass
class Exported:
    """What an export became, and what it is not."""

    groups: int
    """Input groups of the model."""
    rank: int
    """The rank of the LoRA; 0 where there is none."""
    lost: Counter[str] = field(default_factory=Counter)
    """What other engines will not do -> in how many input groups."""
    changed: Counter[str] = field(default_factory=Counter)
    """What is written otherwise than it was -> in how many input groups."""

    @property
    def notes(self) -> list[str]:
        """What people are told, one line each, the losses first."""
        told = [("LOST", self.lost), ("changed", self.changed)]
        notes = [f"{w}: {what} ({n} of {self.groups} input groups)" for w, c in told for what, n in sorted(c.items())]
        apart = "LOST without the LoRA: the repair; the base alone may answer nonsense"
        return [apart, *notes] if self.rank else notes

    @property
    def max_lora_rank(self) -> int:
        return next(rank for rank in LORA_RANKS if rank >= self.rank)


def export(folder: Path, output: Path, peft: bool) -> Exported:
    """Writes `output`: a compressed-tensors checkpoint of the codes alone and, with peft, the repair as a LoRA in
    `output/adapter`. Peak memory: one file of the checkpoint.

    ConfigError where output exists or the recipe cannot be said to other engines; CheckpointError where a file of the
    checkpoint is not what its manifest says, or the output cannot be written.
    """
    checkpoint = Checkpoint.open(folder)
    if output.exists():
        raise ConfigError(f"{output} exists; give a folder that does not")
    _refuse(checkpoint, peft)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        make_folder(unfinished)
        exported = _Export(checkpoint, unfinished, peft).write(output.name)
        unfinished.rename(output)
    except OSError as error:
        raise cannot_write(output, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return exported


def _refuse(checkpoint: Checkpoint, peft: bool) -> None:
    """What names and shapes tell is told before anything is written."""
    for prefix, name, group in _groups(checkpoint):
        try:
            LinearFormat.of(group)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{name} cannot be exported: {error}") from None
        if why := why_not(group, peft):
            raise ConfigError(f"{prefix}{name} cannot be exported: {why}")
    rank = max(group.static_rank for _, _, group in _groups(checkpoint))
    if peft and rank == 0:
        raise ConfigError(f"{checkpoint.folder} has no repair that could become a LoRA; export with --base-only")
    if peft and rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"{checkpoint.folder} has a repair of rank {rank}, and vLLM takes LoRAs up to {LORA_RANKS[-1]}; "
            "quantize with a smaller budget"
        )


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[str, str, GroupLayout]]:
    """(prefix of the block, name, layout) of every input group."""
    for block, layout in checkpoint.blocks:
        for name, group in layout.groups.items():
            yield block.prefix, name, group


class _Export:
    def __init__(self, checkpoint: Checkpoint, output: Path, peft: bool) -> None:
        self.checkpoint, self.output, self.peft = checkpoint, output, peft
        self.arch: Family = archs.for_checkpoint(checkpoint.config)
        groups = [group for _, _, group in _groups(checkpoint)]
        self.done = Exported(len(groups), max(group.static_rank for group in groups) if peft else 0)
        for group in groups:
            self.done.lost += losses(group, peft)
        self.dense: set[tuple[int, str]] = set()
        """(block, linear) of what is in 16 bits now."""
        self.files: dict[str, str] = {}
        """SHA-256 of each file that is written."""

    def write(self, title: str) -> Exported:
        self._write_weights()
        for name in COPIED:
            if (self.checkpoint.folder / name).exists():
                publish(self.output / name, partial(shutil.copyfile, self.checkpoint.folder / name))
        if self.peft:
            self._write_adapter()
        publish_json(self.output / REPORT, {
            "exported_from": str(self.checkpoint.folder.resolve()),
            "recipe": self.checkpoint.manifest.recipe,
            "input_groups": self.done.groups,
            "lora_rank": self.done.rank,
            "lost": dict(sorted(self.done.lost.items())),
            "changed": dict(sorted(self.done.changed.items())),
            "files": self.files,
        })  # fmt: skip
        card = model_card(title, self.done)
        publish(self.output / CARD, lambda path: path.write_text(card))
        quantization = quantization_config(self.checkpoint, self.arch, self.dense)
        publish_json(self.output / "config.json", {**self.checkpoint.config, "quantization_config": quantization})
        return self.done

    def _write_weights(self) -> None:
        """Every file under its own name."""
        weight_map: dict[str, str] = {}
        size, blocks = 0, self._block_of_file()
        feeders = self.arch.feeders(self.checkpoint.config)
        for file, expected in self.checkpoint.manifest.files.items():
            path = self.checkpoint.folder / file
            if not path.exists() or sha256(path) != expected:
                raise CheckpointError(f"{path} is missing or not what the manifest says; see qe-dist verify")
            if file in blocks:
                index = blocks[file]
                prefix, layout = self.checkpoint.manifest.blocks[index].prefix, self.checkpoint.layout.blocks[index]
                block = exported_block(prefix, layout, load_file(path), feeders, self.peft)
                self.files[file] = publish_tensors(self.output / file, block.tensors)
                self._note(index, block)
                weight_map |= dict.fromkeys(block.tensors, file)
            else:
                publish(self.output / file, partial(shutil.copyfile, path))
                self.files[file] = expected
                weight_map |= dict.fromkeys(self.checkpoint.tensors[file], file)
            size += (self.output / file).stat().st_size
        index_json = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        publish_json(self.output / INDEX, index_json)

    def _block_of_file(self) -> dict[str, int]:
        prefixes = [block.prefix for block in self.checkpoint.manifest.blocks]
        found = self.checkpoint.weight_map.items()
        return {file: i for i, prefix in enumerate(prefixes) for name, file in found if name.startswith(prefix)}

    def _note(self, index: int, block: ExportedBlock) -> None:
        self.done.changed += block.changed
        self.dense |= {(index, linear) for linear in block.dense}
        if self.peft:
            modules = {f"base_model.model.{self.arch.blocks}.{index}.{n}": p for n, p in block.adapters.items()}
            tensors = {f"{m}.{n}": t for m, p in modules.items() for n, t in lora_tensors(p, self.done.rank).items()}
            publish_tensors(self.output / ADAPTER / f"part-{index:05d}.safetensors", tensors)

    def _write_adapter(self) -> None:
        """One file, which PEFT and vLLM want, of the parts of the blocks."""
        folder = self.output / ADAPTER
        paths = sorted(folder.glob("part-*.safetensors"))
        parts = [safe_open(path, framework="pt") for path in paths]
        held = {name: part for part in parts for name in part.keys()}  # noqa: SIM118 (not a dict)
        described = {
            name: torch.empty(part.get_slice(name).get_shape(), dtype=torch.bfloat16, device="meta")
            for name, part in held.items()
        }
        file = "adapter_model.safetensors"
        hashed = publish_one_by_one(folder / file, described, lambda name: held[name].get_tensor(name))
        self.files[f"{ADAPTER}/{file}"] = hashed
        for path in paths:
            path.unlink()
        linears = sorted({linear for _, _, group in _groups(self.checkpoint) for linear in group.linears})
        publish_json(folder / "adapter_config.json", adapter_config(self.arch, linears, self.done.rank))


def quantization_config(checkpoint: Checkpoint, arch: Family, dense: set[tuple[int, str]]) -> dict[str, Any]:
    """What compressed-tensors reads. dense: (block, linear) of what is in 16 bits."""
    blocks_of: dict[LinearFormat, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for index, layout in enumerate(checkpoint.layout.blocks):
        for group in layout.groups.values():
            for linear in group.linears:
                if (index, linear) not in dense:
                    blocks_of[LinearFormat.of(group)][linear].add(index)
    every = set(range(len(checkpoint.layout.blocks)))
    layers = arch.blocks.rpartition(".")[2]

    def pattern(linear: str, blocks: set[int]) -> str:
        numbers = r"\d+" if blocks == every else f"({'|'.join(map(str, sorted(blocks)))})"
        return rf"re:.*\b{layers}\.{numbers}\.{re.escape(linear)}$"

    groups = [form.config(pattern(*item) for item in found.items()) for form, found in blocks_of.items()]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(arch.unquantized),
    }


def adapter_config(arch: Family, linears: list[str], rank: int) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"{re.escape(arch.blocks)}\.\d+\.({'|'.join(map(re.escape, linears))})",
        "inference_mode": True,
    }


def model_card(title: str, exported: Exported) -> str:
    """README.md of an export: what it lacks comes first."""
    notes = "\n".join(f"- {note}" for note in exported.notes) or "- nothing is lost"
    serve = f"    vllm serve {title}"
    if exported.rank:
        serve += (
            f" --enable-lora --max-lora-rank {exported.max_lora_rank} --lora-modules repaired={title}/{ADAPTER}\n\n"
            f"Ask for the model `repaired`, not for `{title}`."
        )
    return (
        f"# {title}\n\n"
        "Weights of a checkpoint of qe_dist for engines that do not know it, as compressed-tensors reads them.\n\n"
        f"**This is not the checkpoint it was made from:**\n\n{notes}\n\n"
        f"The same is in `{REPORT}`, for machines.\n\n{serve}\n"
    )
