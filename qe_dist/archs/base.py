"""An architecture is composed: a decoder, a front end that embeds, and their names on disk and in engines.

Modules come from transformers, empty, and are filled from the source. `config` without more is a `config.json`; the
parts are given what transformers makes of it: the configuration of the whole model, or of its decoder (`text`).
"""

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from qe_dist.archs.shared.modules import empty, fill
from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.rotation import RotatedTensor, RotationSites, Space
from qe_dist.core.sample import Example, PixelBounds, Sample
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, Feeder, InputGroup, LinearSpec, ModelSpec

RunBlock = Callable[[Batch], Tensor]
"""A block with its weights: hidden states after it, [B, L, D]."""
BlockLoader = Callable[[], RunBlock]
HEAD = "lm_head.weight"


@runtime_checkable
class Encoder(Protocol):
    def __call__(self, sample: Sample, images: Sequence[Image.Image]) -> Example: ...


@runtime_checkable
class Prelude(Protocol):
    """Embeddings and vision tower."""

    def __call__(self, examples: Sequence[Example], index: int) -> Batch: ...


class ImageReader(Protocol):
    token: int
    """The placeholder of an image in the tokens of a text."""

    def __call__(
        self, images: Sequence[Image.Image], bounds: Sequence[PixelBounds]
    ) -> tuple[Mapping[str, Tensor], list[int]]:
        """What the vision tower takes, and how many tokens each image becomes. bounds: of each image. Raises ValueError
        for an image, or for bounds, that the processor does not take."""
        ...


@dataclass(frozen=True)
class Site:
    """What a linear writes and reads of that which a rotation can turn, and the norm in front of it."""

    rows: Space | None
    columns: Space | None
    norm: str | None


class Decoder(Protocol):
    """The blocks of a family. All names are relative to a block."""

    norm: str
    """The norm in front of every block; the one behind the last block is of its kind."""
    gain_offset: float
    """What the norms of the residual stream add to their weights: 1 where these are stored around 0."""
    reads_tables_alone: bool
    """Whether `context` has nothing but tables [.., B or 1, L, _], which can be taken apart by sample."""
    inner_width: str
    """What the configuration calls the width of the input of the groups that have producers."""
    kept: tuple[str, ...]
    """Linears of a block that stay in 16 bits."""
    sites: ClassVar[Mapping[str, Site]]
    """What every linear of any block writes and reads."""
    tiny: ClassVar[Mapping[str, Any]]
    """Settings of a decoder that takes milliseconds, for tests."""

    def unsupported(self, text: Any) -> Iterator[str]:
        """Each setting that makes a block other than the one described here, with the reason."""
        ...

    def layer(self) -> type[nn.Module]:
        """The class of a block, made from `text` and the index of the block. Imports what it is made of."""
        ...

    def head_width(self, text: Any) -> int:
        """Channels of an attention head."""
        ...

    def groups(self, text: Any, index: int) -> tuple[InputGroup, ...]:
        """The input groups of block `index`, the first of which reads what `norm` makes; whether linears have a bias is
        not known here. Groups of one name are equal in all blocks."""
        ...

    def others(self, text: Any, index: int) -> tuple[str, ...]:
        """The parameters of block `index` that stay as they are."""
        ...

    def scratch(self, text: Any, index: int) -> int:
        """Numbers in float32 that block `index` holds for each token while it runs, beside the inputs of its groups."""
        ...

    def feeders(self, text: Any) -> Mapping[str, Feeder]:
        """What makes the input of every linear of any block channel by channel, where something does."""
        ...

    def context(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the blocks need beside hidden states, out of the keyword arguments that transformers calls the decoder
        and its first block with."""
        ...

    def context_behind(self, context: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
        """Returns what of `context` blocks behind block `index` still need."""
        ...

    def run(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        """Hidden states behind block `index`, [B, L, D], with all that the decoder does to them before the next one."""
        ...


class Frontend(Protocol):
    """A way to embed. `config` is the configuration of the whole model, as transformers has it."""

    auto_class: str
    """The class of transformers that loads the whole model."""
    decoder: str
    """Prefix of the decoder in the model without head (`language_model.`, or nothing)."""
    unquantized: tuple[str, ...]
    """Linears outside of decoder and head, as compressed-tensors ignores them: names, or patterns after `re:`."""
    modality_argument: str | None
    """Keyword argument of the model that tells for every token whether it is of an image (not 0)."""

    def stream_writers(self, config: Any) -> tuple[str, ...]:
        """Linears outside of the blocks that write into the residual stream, in the model without head."""
        ...

    def has_vision(self, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is that of a model that sees images."""
        ...

    def images(self, folder: Path, config: Any) -> ImageReader | None:
        """None for a model of text only."""
        ...

    def image_ids(self, config: Any) -> tuple[int, ...]:
        """Tokens that stand for parts of images or videos."""
        ...

    def vision_heads(self, config: Any) -> int:
        """Attention heads of the vision tower, which engines cut over ranks, too; 0 for a model of text only."""
        ...

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        """Right-padded keyword arguments of the whole model."""
        ...


@dataclass(frozen=True)
class EngineNames:
    """What an engine calls the parts of a model."""

    blocks: str
    """Where the engine's model has the blocks."""
    modules: Mapping[str, str]
    """Input group -> the linear that computes all linears of the group at once, both relative to the block."""
    decoder: str
    """The class of its model that has the blocks, which says what it fuses."""
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    """Input group -> one of its linears, where the engine would take the name of its own linear for that of a part."""
    draft: str | None = None
    """The `model_type` that it gives the model which drafts tokens, made of `Family.drafts`."""


@dataclass(frozen=True)
class Family:
    """The models of some `model_type`s; the first one is its name."""

    model_types: tuple[str, ...]
    decoder: Decoder
    frontend: Frontend
    on_disk: Mapping[str, tuple[str, ...]]
    """Prefix in the model without head -> what files have in its place: the first that is there, or the last."""
    in_vllm: EngineNames
    tiny: Mapping[str, Any]
    """A `config.json` of a model that takes milliseconds, for tests."""
    drafts: str | None = None
    """Begins the names of what drafts tokens for engines, reading the residual stream behind the last block. Nothing of
    it is quantized."""

    @property
    def name(self) -> str:
        return self.model_types[0]

    @property
    def blocks(self) -> str:
        """Where the Hugging Face model has its blocks (`model.language_model.layers`)."""
        return f"model.{self.frontend.decoder}layers"

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Linears that are not quantized, as compressed-tensors ignores them: names, or patterns after `re:`."""
        kept = [rf"re:.*\blayers\.\d+\.{re.escape(name)}$" for name in self.decoder.kept]
        drafts = [rf"re:.*\b{re.escape(self.drafts)}.*"] if self.drafts else []
        return (HEAD.removesuffix(".weight"), *self.frontend.unquantized, *kept, *drafts)

    def warm_up(self) -> None:
        """Imports what blocks are made of: seconds, which a worker has while others are still being started."""
        import accelerate  # noqa: F401

        self.decoder.layer()

    def hf_config(self, config: Mapping[str, Any]) -> Any:
        """What transformers makes of a `config.json`."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))

    def text(self, config: Mapping[str, Any]) -> Any:
        """The settings of the decoder, as transformers has them."""
        return self.hf_config(config).get_text_config()

    def auto_class(self) -> Any:
        """The class of transformers whose `from_pretrained` loads the whole model."""
        return getattr(importlib.import_module("transformers"), self.frontend.auto_class)

    def disk_name(self, name: str, source: WeightSource) -> str:
        """Name in the model without head -> name of the tensor in the files."""
        prefix = next(p for p in self.on_disk if name.startswith(p))
        names = [f"{other}{name.removeprefix(prefix)}" for other in self.on_disk[prefix]]
        return next((n for n in names if n in source.names()), names[-1])

    def groups(self, config: Mapping[str, Any]) -> tuple[InputGroup, ...]:
        """The input groups that blocks have, each once, from a `config.json`; whether linears have a bias is not known
        there."""
        text = self.text(config)
        every = (group for i in range(text.num_hidden_layers) for group in self.decoder.groups(text, i))
        return tuple({group.name: group for group in every}.values())

    def feeders(self, config: Mapping[str, Any]) -> Mapping[str, Feeder]:
        """What makes the input of every linear of any block channel by channel, where something does."""
        return self.decoder.feeders(self.text(config))

    def vision_heads(self, config: Mapping[str, Any]) -> int:
        """Attention heads of the vision tower, which engines cut over ranks, too; 0 for a model of text only."""
        return self.frontend.vision_heads(self.hf_config(config))

    def has_vision(self, config: Mapping[str, Any]) -> bool:
        """Whether it is the `config.json` of a model that sees images."""
        return self.frontend.has_vision(config)

    def widened(self, config: Mapping[str, Any], width: int) -> Mapping[str, Any]:
        """`config.json` with another inner width of the MLPs. Published configs of models with images have it at the
        top, newer ones in `text_config`, some in both places."""
        wider, name = copy.deepcopy(dict(config)), self.decoder.inner_width
        for place in (wider.get("text_config", wider), *([wider] if name in wider else [])):
            place[name] = width
        return wider

    def spec(self, source: WeightSource) -> ModelSpec:
        """Names and shapes. CheckpointError where those on disk are not what config.json asks for."""
        text, first, blocks = self.text(source.config), f"{self.decoder.norm}.weight", []
        for i in range(text.num_hidden_layers):
            name = self.disk_name(f"{self.frontend.decoder}layers.{i}.{first}", source)
            blocks.append(self._block_spec(text, i, name.removesuffix(first), source))
        claimed = {n for b in blocks for n in source.names() if n.startswith(b.prefix)}
        passthrough = tuple(sorted(set(source.names()) - claimed))
        return ModelSpec(self.name, tuple(blocks), passthrough)

    def _block_spec(self, text: Any, index: int, prefix: str, source: WeightSource) -> BlockSpec:
        """A block, whose linears have biases where the source has them."""

        def checked(linear: LinearSpec) -> LinearSpec:
            name, wanted = f"{prefix}{linear.name}", (linear.out_features, linear.in_features)
            if (found := source.shape(f"{name}.weight")) != wanted:
                raise CheckpointError(
                    f"{source.folder}: {name}.weight has shape {found}, config.json asks for {wanted}"
                )
            return replace(linear, bias=f"{name}.bias" in source.names())

        groups = self.decoder.groups(text, index)
        own = tuple(replace(group, linears=tuple(map(checked, group.linears))) for group in groups)
        others, scratch = self.decoder.others(text, index), self.decoder.scratch(text, index)
        return BlockSpec(index, prefix, own, others, scratch)

    def encoder(self, folder: Path) -> Encoder:
        """CheckpointError where tokenizer, chat template or image processor is missing."""
        from qe_dist.archs.shared.chat import ChatEncoder

        said = json.loads((folder / "config.json").read_text())
        config = self.hf_config(said)
        text = config.get_text_config()
        ends = (text.eos_token_id, said.get("eos_token_id"))  # published configs have one, the other, or both
        end = {token for some in ends for token in (some if isinstance(some, list) else [some])} - {None}
        images, placeholders = self.frontend.images(folder, config), self.frontend.image_ids(config)
        return ChatEncoder(folder, images, placeholders, end, text.max_position_embeddings)

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        """Right-padded keyword arguments of the whole Hugging Face model."""
        return self.frontend.model_inputs(examples, pad)

    def prelude(self, source: WeightSource, device: str, dtype: torch.dtype) -> Prelude:
        from qe_dist.archs.shared.prelude import HFPrelude

        return HFPrelude(self, source, device, dtype)

    def empty_block(self, config: Mapping[str, Any], index: int) -> nn.Module:
        """One decoder block on the meta device."""
        text = self.text(config)
        text._attn_implementation = "sdpa"
        return empty(lambda: self.decoder.layer()(text, index), include_buffers=True)

    def block(self, source: WeightSource, spec: BlockSpec, device: str, dtype: torch.dtype) -> nn.Module:
        """One decoder block with its weights. Peak memory: the block."""
        module = self.empty_block(source.config, spec.index)
        disk = {n: spec.prefix + n for n, _ in module.named_parameters()}
        return fill(module, source, disk, device, dtype)

    @torch.no_grad()
    def run_block(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        """Hidden states behind block `index`, [B, L, D], as they enter the next one; without gradients, for which
        `decoder.run` is there."""
        return self.decoder.run(block, batch, index)

    def passed_on(self, batch: Batch, index: int) -> Batch:
        """The batch without what only blocks up to `index` needed."""
        return replace(batch, context=self.decoder.context_behind(batch.context, index))

    def last_norm(self, source: WeightSource, device: str, dtype: torch.dtype) -> nn.Module:
        """What stands between the last block and the head."""
        norm = self.empty_block(source.config, 0).get_submodule(self.decoder.norm)
        return fill(norm, source, {"weight": self._last_norm(source)}, device, dtype)

    def head(self, source: WeightSource) -> str:
        """Name of the tensor that is the head; that of the embeddings where they are tied."""
        return HEAD if HEAD in source.names() else self._embeddings(source)

    def _last_norm(self, source: WeightSource) -> str:
        return self.disk_name(f"{self.frontend.decoder}norm.weight", source)

    def _embeddings(self, source: WeightSource) -> str:
        return self.disk_name(f"{self.frontend.decoder}embed_tokens.weight", source)

    def rotation_sites(self, source: WeightSource) -> RotationSites:
        """Every tensor that writes or reads the residual stream, or an attention head's values. ConfigError where
        something else reads the stream, which cannot be rotated."""
        drafts = sorted(name for name in source.names() if self.drafts and name.startswith(self.drafts))
        if drafts:
            raise ConfigError(
                f"{source.folder} has {drafts[0]} and {len(drafts) - 1} more tensors of a model that drafts tokens: it "
                "reads the residual stream behind the last norm, whose gain a rotation moves into the head. Choose a "
                f"recipe without rotation, or take {self.drafts}* out of the model's index"
            )
        config = self.hf_config(source.config)
        text, norm, embeddings = config.get_text_config(), self._last_norm(source), self._embeddings(source)
        read = self.head(source) if config.tie_word_embeddings else HEAD
        norms, tensors = {norm}, {
            embeddings: RotatedTensor(embeddings, columns="stream", stored=True),
            HEAD: RotatedTensor(read, columns="stream", gain=norm, stored=True),
        }  # fmt: skip
        for writer in self.frontend.stream_writers(config):
            linear = self.disk_name(f"{writer}.weight", source).removesuffix("weight")
            tensors |= {linear + n: RotatedTensor(linear + n, rows="stream", stored=True) for n in ("weight", "bias")}
        for block in self.spec(source).blocks:
            quantized = {linear.name for group in block.groups for linear in group.linears}
            own = quantized | {name.removesuffix(".weight") for name in block.others}
            for linear, site in ((n, site) for n, site in self.decoder.sites.items() if n in own):
                weight, bias = (f"{block.prefix}{linear}.{n}" for n in ("weight", "bias"))
                gain = site.norm and f"{block.prefix}{site.norm}.weight"
                norms |= {gain} if gain else set()
                tensors[weight] = RotatedTensor(weight, site.rows, site.columns, gain, stored=linear not in quantized)
                if site.rows and bias in source.names():
                    tensors[bias] = RotatedTensor(bias, site.rows, stored=True)
        widths: dict[Space, int] = {"stream": text.hidden_size, "head": self.decoder.head_width(text)}
        return RotationSites(_untied(source.config), widths, frozenset(norms), tensors, self.decoder.gain_offset)


def _untied(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The head takes the last norm's gain, the embeddings do not. Older configs have the flag in `text_config`."""
    untied = copy.deepcopy(dict(config)) | {"tie_word_embeddings": False}
    if "tie_word_embeddings" in untied.get("text_config", {}):
        untied["text_config"]["tie_word_embeddings"] = False
    return untied
