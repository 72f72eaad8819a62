"""How much the loss depends on an image token beside a text token: MBQ's ratio, by a true backward pass.

The loss is that of the answers, and a token's share the mean |dLoss/dy| of the outputs of attention and of the MLP of
every block (arXiv 2412.19509). The whole model is in memory, with the activations of one sample: an explicit step for
models that fit, beside the pipeline, which never holds one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from qe_dist.archs.base import Family
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Example


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss depends on tokens of images, relative to other tokens; one entry for each linear that writes to
    the residual stream."""

    places: tuple[str, ...]
    image_to_text: tuple[float, ...]
    image_to_answer: tuple[float, ...]
    tokens: Mapping[str, int]
    """How many tokens of each kind were seen: image, text, answer."""

    @property
    def image_weight(self) -> float:
        """What the transform `mbq` takes: the median over all places, below which MBQ lets no layer fall."""
        return median(self.image_to_text)


def check_memory(model_bytes: int) -> None:
    """ConfigError where a model of so many bytes and the activations of a sample will hardly fit."""
    free = psutil.virtual_memory().available
    if 2 * model_bytes > free:
        raise ConfigError(
            f"a backward pass takes about {2 * model_bytes / 2**30:.1f} GiB, twice the model in float32, and "
            f"{free / 2**30:.1f} are free; use a larger machine, or leave image_weight as published"
        )


def sensitivity(model: Any, arch: Family, examples: Sequence[Example]) -> Sensitivity:
    """Measures a loaded model in float32 by backward passes. ConfigError where no example has tokens of images, other
    ones and an answer."""
    useful = [e for e in examples if all(bool(chosen.any()) for chosen in _kinds(e).values())]
    if not useful:
        raise ConfigError("no sample has an image, text and an answer; MBQ's ratio compares their tokens")
    writers = {x.name for g in arch.groups(model.config.to_dict()) for x in g.linears if x.split == "row"}
    blocks = enumerate(model.get_decoder().layers)
    gradients = _Gradients({f"{i} {n}": m for i, b in blocks for n, m in b.named_modules() if n in writers})
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, made: made.requires_grad_())
    for example in useful:
        gradients.kinds = {kind: chosen.to(model.device) for kind, chosen in _kinds(example).items()}
        inputs = {k: v.to(model.device) for k, v in arch.model_inputs([example], pad=0).items()}
        with torch.enable_grad():
            model(**inputs, labels=example.labels[None].to(model.device), use_cache=False).loss.backward()
    tokens = {k: sum(int(_kinds(e)[k].sum()) for e in useful) for k in ("image", "text", "answer")}
    places = tuple(gradients.sums)
    text, answer = (tuple(gradients.ratio(p, kind, tokens) for p in places) for kind in ("text", "answer"))
    return Sensitivity(places, text, answer, tokens)


def _kinds(example: Example) -> dict[str, Tensor]:
    return {
        "image": example.modality == IMAGE,
        "text": example.modality == TEXT,
        "answer": example.labels != -100,
    }


class _Gradients:
    """Sums of |dLoss/dy| over the tokens of each kind, gathered by hooks on the outputs of some modules."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.kinds: dict[str, Tensor] = {}
        """Which tokens of the running sample are of each kind."""
        self.sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in modules}
        for name, module in modules.items():
            module.register_full_backward_hook(partial(self._add, name))

    def _add(self, name: str, module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        gradient = outputs[0]
        for kind, chosen in self.kinds.items():
            self.sums[name][kind] += float(gradient[0, chosen].abs().mean(dim=1).double().sum())

    def ratio(self, name: str, kind: str, tokens: Mapping[str, int]) -> float:
        """Mean of an image token over mean of a token of this kind."""
        image, other = (self.sums[name][k] / tokens[k] for k in ("image", kind))
        return image / other
