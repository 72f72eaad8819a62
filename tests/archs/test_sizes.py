"""Published models at full size, by names and shapes alone: every tensor has its place, and a plan can be made."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.core.spec import ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import Task, WorkerCapacity, make_plan
from qe_dist.methods.recipes import load_recipe
from tests.archs.drafts import draft_shapes

CONFIGS = Path(__file__).parent / "configs"
TABLE = re.findall(r"^\| (\S+) \| \S+ \| (\d+|-) \|$", (CONFIGS / "README.md").read_text(), re.MULTILINE)
PUBLISHED = {"qwen2_vl": ("model.", "visual."), "qwen2_5_vl": ("model.", "visual.")}
"""Where published files have decoder and tower; the others have them where transformers' model has them."""
WAVES = {
    "llama-3.1-70b": 3, "qwen2.5-72b": 3, "qwen2-vl-72b": 3, "qwen2.5-vl-72b": 3, "qwen3-32b": 2, "qwen3-vl-32b": 2,
}  # fmt: skip
"""The others go in one."""


class OnMeta:
    """A published model without its weights: the names and shapes of what transformers makes of its config.json."""

    def __init__(self, name: str) -> None:
        self.config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
        self.folder = Path(name)
        arch = archs.for_config(self.config)
        with torch.device("meta"):
            model = arch.auto_class().from_config(arch.hf_config(self.config))
        self.tensors = {self._published(n): t for n, t in model.named_parameters()}
        if arch.drafts:
            shapes = draft_shapes(arch, self.config)
            self.tensors |= {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}

    def _published(self, name: str) -> str:
        decoder, tower = PUBLISHED.get(self.config["model_type"], ("model.language_model.", "model.visual."))
        return name.replace("model.language_model.", decoder).replace("model.visual.", tower)

    def names(self) -> Any:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


@cache
def opened(name: str) -> tuple[Family, OnMeta, ModelSpec]:
    source = OnMeta(name)
    arch = archs.for_config(source.config)
    return arch, source, arch.spec(source)


@pytest.mark.parametrize(("name", "published"), TABLE)
def test_the_bytes_are_those_of_the_published_index(name: str, published: str) -> None:
    _, source, _ = opened(name)
    found = sum(2 * tensor.numel() for tensor in source.tensors.values())
    assert published in (str(found), "-")


def test_every_configuration_is_in_the_table() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted(name for name, _ in TABLE)
    assert {opened(name)[0].name for name, _ in TABLE} == set(archs.names())


@pytest.mark.parametrize("name", [name for name, _ in TABLE])
def test_every_tensor_has_its_place(name: str) -> None:
    arch, source, spec = opened(name)
    claimed: dict[str, tuple[int, ...]] = {n: source.shape(n) for n in spec.passthrough}
    for block in spec.blocks:
        claimed |= {block.prefix + n: source.shape(block.prefix + n) for n in block.others}
        for linear in (x for group in block.groups for x in group.linears):
            claimed[f"{block.prefix}{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                claimed[f"{block.prefix}{linear.name}.bias"] = (linear.out_features,)
    assert claimed == {n: tuple(t.shape) for n, t in source.tensors.items()}
    assert len(spec.blocks) == arch.text(source.config).num_hidden_layers
    outside = ("embed_tokens", "norm.weight", "lm_head", "visual.", "mtp.")
    assert all(any(part in n for part in outside) for n in spec.passthrough)
    sites = replace(arch, drafts=None).rotation_sites(source)
    assert {site.source for site in sites.tensors.values()} | sites.norms <= source.names()


@pytest.mark.parametrize("name", [name for name, _ in TABLE])
def test_blocks_are_shared_out_over_eight_workers_of_80_gb(name: str) -> None:
    """At 16k tokens a batch; statistics and fit need more than the weights."""
    run = RunConfig(Path("model"), load_recipe("qe-w4a8"), Path("data.jsonl"), Path("/tmp/out"))
    _, _, spec = opened(name)
    task = Task(spec, (run,), batch_tokens=4 * 4096, num_samples=512)
    waves = make_plan(task, [WorkerCapacity(80 * 10**9)] * 8)
    assert [b.index for wave in waves for part in wave for b in part.blocks] == list(range(len(spec.blocks)))
    assert len(waves) == WAVES.get(name, 1)
    need = task.footprint(spec.blocks[0])
    assert need.kept > need.weights == 4 * spec.blocks[0].num_weights
    assert all(len(part.blocks) * need.kept + need.passing <= 80 * 10**9 for wave in waves for part in wave)
