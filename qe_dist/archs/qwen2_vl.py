"""Qwen2-VL (2B, 7B, 72B): Qwen2 decoder with M-RoPE, vision tower with a merger."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qe_dist.archs.base import fill
from qe_dist.archs.encoder import ChatEncoder
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.errors import CheckpointError
from qe_dist.core.rotation import RotatedTensor, RotationSites, Space
from qe_dist.core.sample import Example
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, Feeder, InputGroup, LinearSpec, ModelSpec

_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# (group, linears, how they are split over tensor-parallel ranks, group whose input the router reads, producers)
_GROUPS = (
    ("self_attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "column", "self_attn.qkv", ()),
    ("self_attn.o", ("self_attn.o_proj",), "row", "self_attn.qkv", ()),
    ("mlp.gate_up", _GATE_UP, "column", "mlp.gate_up", ()),
    ("mlp.down", ("mlp.down_proj",), "row", "mlp.gate_up", _GATE_UP),
)  # fmt: skip
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
# linear -> (what it writes, what it reads, norm in front of it) of that which a rotation can turn: not the inner
# dimension of the MLP (SwiGLU multiplies channel by channel), nor what q and k write (RoPE turns pairs of channels)
_SITES: Mapping[str, tuple[Space | None, Space | None, str | None]] = {
    "self_attn.q_proj": (None, "stream", _NORMS[0]),
    "self_attn.k_proj": (None, "stream", _NORMS[0]),
    "self_attn.v_proj": ("head", "stream", _NORMS[0]),
    "self_attn.o_proj": ("stream", "head", None),
    "mlp.gate_proj": (None, "stream", _NORMS[1]),
    "mlp.up_proj": (None, "stream", _NORMS[1]),
    "mlp.down_proj": ("stream", None, None),
}


class _Caught(Exception):
    """Ends the Hugging Face forward when the first block's input is known."""


class _Catcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.caught: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        self.caught = (hidden_states, position_embeddings)
        raise _Caught


class _Prelude:
    """The Hugging Face model itself, its blocks replaced by a catcher."""

    def __init__(self, arch: "Qwen2VL", source: WeightSource, device: str, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import Qwen2VLModel

        config = arch.hf_config(source.config)
        config.text_config.num_hidden_layers = 1
        config.text_config.layer_types = ["full_attention"]
        with init_empty_weights(include_buffers=False):
            model = Qwen2VLModel(config)
        self.catcher = _Catcher()
        model.language_model.layers = nn.ModuleList([self.catcher])
        model.language_model.norm = nn.Identity()
        disk = {n: arch.disk_name(n, source) for n, _ in model.named_parameters()}
        self.model = fill(model, source, disk, device, dtype)
        self.arch, self.device, self.dtype = arch, device, dtype
        self.pad = config.text_config.pad_token_id or 0

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], index: int) -> Batch:
        inputs = self.arch.model_inputs(examples, self.pad)
        with contextlib.suppress(_Caught):
            self.model(**{k: v.to(self.device) for k, v in inputs.items()}, use_cache=False)
        assert self.catcher.caught is not None, "the model ended before its first block"
        hidden, (cos, sin) = self.catcher.caught
        modality = pad_sequence([e.modality for e in examples], batch_first=True, padding_value=PADDING)
        ids = torch.tensor([e.index for e in examples])
        return Batch(index, hidden.cpu(), modality, ids, {"cos": cos.cpu(), "sin": sin.cpu()})


class Qwen2VL:
    model_types = ("qwen2_vl",)
    blocks = "model.language_model.layers"
    unquantized = ("lm_head", r"re:.*\bvisual\..*")

    def warm_up(self) -> None:
        import accelerate  # noqa: F401
        import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401

    def hf_config(self, config: Mapping[str, Any]) -> Any:
        from transformers import Qwen2VLConfig

        return Qwen2VLConfig.from_dict(copy.deepcopy(dict(config)))

    def disk_name(self, name: str, source: WeightSource) -> str:
        """Module name -> tensor name: published files say `model.layers` and `visual`, newer saves may not."""
        if name.startswith("visual."):
            return name if name in source.names() else f"model.{name}"
        plain = f"model.{name.removeprefix('language_model.')}"
        return plain if plain in source.names() else f"model.{name}"

    def groups(self, config: Mapping[str, Any]) -> tuple[InputGroup, ...]:
        text = self.hf_config(config).text_config
        heads, kv = text.num_attention_heads, text.num_key_value_heads
        hidden, wide = text.hidden_size, text.intermediate_size
        head = hidden // heads
        # outputs, inputs, heads
        linears = {
            "self_attn.q_proj": (heads * head, hidden, heads), "self_attn.k_proj": (kv * head, hidden, kv),
            "self_attn.v_proj": (kv * head, hidden, kv), "self_attn.o_proj": (hidden, heads * head, heads),
            "mlp.gate_proj": (wide, hidden, None), "mlp.up_proj": (wide, hidden, None),
            "mlp.down_proj": (hidden, wide, None),
        }  # fmt: skip
        groups = []
        for name, members, split, router_input, producers in _GROUPS:
            sizes = {n: linears[n] for n in members}
            specs = [LinearSpec(n, inputs, outputs, False, split, h) for n, (outputs, inputs, h) in sizes.items()]
            groups.append(InputGroup(name, tuple(specs), router_input, producers))
        return tuple(groups)

    def vision_heads(self, config: Mapping[str, Any]) -> int:
        return self.hf_config(config).vision_config.num_heads

    def widened(self, config: Mapping[str, Any], width: int) -> Mapping[str, Any]:
        """Published configs have it beside `vision_config`, newer ones in `text_config`, some in both places."""
        wider = copy.deepcopy(dict(config))
        places = [wider.get("text_config", wider), *([wider] if "intermediate_size" in wider else [])]
        for place in places:
            place["intermediate_size"] = width
        return wider

    def spec(self, source: WeightSource) -> ModelSpec:
        groups = self.groups(source.config)
        blocks = []
        for i in range(self.hf_config(source.config).text_config.num_hidden_layers):
            first = self.disk_name(f"language_model.layers.{i}.{_NORMS[0]}", source)
            blocks.append(_block_spec(i, first.removesuffix(_NORMS[0]), groups, source))
        claimed = {n for b in blocks for n in source.names() if n.startswith(b.prefix)}
        passthrough = tuple(sorted(set(source.names()) - claimed))
        return ModelSpec("qwen2_vl", tuple(blocks), passthrough)

    def encoder(self, folder: Path) -> ChatEncoder:
        from transformers import Qwen2VLConfig

        config = Qwen2VLConfig.from_pretrained(folder)
        end = config.text_config.eos_token_id
        return ChatEncoder(folder, config.image_token_id, end[0] if isinstance(end, list) else end)

    def prelude(self, source: WeightSource, device: str, dtype: torch.dtype) -> _Prelude:
        return _Prelude(self, source, device, dtype)

    def empty_block(self, config: Mapping[str, Any], index: int) -> nn.Module:
        from accelerate import init_empty_weights
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

        text = self.hf_config(config).text_config
        text._attn_implementation = "sdpa"
        with init_empty_weights():
            return Qwen2VLDecoderLayer(text, index)

    def last_norm(self, source: WeightSource, device: str, dtype: torch.dtype) -> nn.Module:
        norm = self.empty_block(source.config, 0).input_layernorm  # of the same kind and width
        return fill(norm, source, {"weight": self.disk_name("language_model.norm.weight", source)}, device, dtype)

    def head(self, source: WeightSource) -> str:
        own = "lm_head.weight"
        return own if own in source.names() else self.disk_name("language_model.embed_tokens.weight", source)

    def block(self, source: WeightSource, spec: BlockSpec, device: str, dtype: torch.dtype) -> nn.Module:
        module = self.empty_block(source.config, spec.index)
        disk = {n: spec.prefix + n for n, _ in module.named_parameters()}
        return fill(module, source, disk, device, dtype)

    @torch.no_grad()
    def run_block(self, block: nn.Module, batch: Batch) -> Tensor:
        where = block.get_parameter(_NORMS[0])  # a quantized block begins with packed integers
        cos, sin = (batch.context[k].to(where) for k in ("cos", "sin"))
        out = block(batch.hidden.to(where), position_embeddings=(cos, sin), use_cache=False)
        return out[0] if isinstance(out, tuple) else out

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        ids = pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad)
        modality = pad_sequence([e.modality for e in examples], batch_first=True, padding_value=0)
        inputs = {"input_ids": ids, "mm_token_type_ids": modality.int()}
        with_images = [e.vision for e in examples if e.vision]
        if with_images:
            inputs |= {k: torch.cat([v[k] for v in with_images]) for k in with_images[0]}
        return inputs

    def rotation_sites(self, source: WeightSource) -> RotationSites:
        config = self.hf_config(source.config)
        text = config.text_config
        norm, embeddings = (self.disk_name(f"language_model.{n}.weight", source) for n in ("norm", "embed_tokens"))
        merger = self.disk_name("visual.merger.mlp.2.weight", source).removesuffix("weight")
        head = "lm_head.weight"
        tied = config.tie_word_embeddings and head not in source.names()
        norms, tensors = (
            {norm},
            {
                embeddings: RotatedTensor(embeddings, columns="stream", stored=True),
                head: RotatedTensor(embeddings if tied else head, columns="stream", gain=norm, stored=True),
            }
            | {merger + n: RotatedTensor(merger + n, rows="stream", stored=True) for n in ("weight", "bias")},
        )
        for block in self.spec(source).blocks:
            norms |= {block.prefix + n for n in _NORMS}
            for linear, (rows, columns, gain) in _SITES.items():
                weight, bias = (f"{block.prefix}{linear}.{n}" for n in ("weight", "bias"))
                tensors[weight] = RotatedTensor(weight, rows, columns, gain and block.prefix + gain)
                if rows and bias in source.names():
                    tensors[bias] = RotatedTensor(bias, rows, stored=True)
        widths: dict[Space, int] = {"stream": text.hidden_size, "head": text.hidden_size // text.num_attention_heads}
        return RotationSites(_untied(source.config), widths, frozenset(norms), tensors)

    def feeders(self, config: Mapping[str, Any]) -> Mapping[str, Feeder]:
        text = self.hf_config(config).text_config
        norms = {linear: Feeder(gain.removesuffix(".weight")) for linear, (_, _, gain) in _SITES.items() if gain}
        values = Feeder("self_attn.v_proj", head=text.hidden_size // text.num_attention_heads)
        return norms | {"self_attn.o_proj": values, "mlp.down_proj": Feeder("mlp.up_proj")}

    def tiny_config(self) -> Mapping[str, Any]:
        return {
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "text_config": {
                "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
            "tie_word_embeddings": False,
        }  # fmt: skip


def _untied(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The head takes the last norm's gain, the embeddings do not. Older configs have the flag in `text_config`."""
    untied = copy.deepcopy(dict(config)) | {"tie_word_embeddings": False}
    if "tie_word_embeddings" in untied.get("text_config", {}):
        untied["text_config"]["tie_word_embeddings"] = False
    return untied


def _block_spec(index: int, prefix: str, groups: Sequence[InputGroup], source: WeightSource) -> BlockSpec:
    """With biases as the source has them, and its shapes compared with those of config.json."""

    def checked(linear: LinearSpec) -> LinearSpec:
        name, wanted = f"{prefix}{linear.name}", (linear.out_features, linear.in_features)
        if (found := source.shape(f"{name}.weight")) != wanted:
            raise CheckpointError(f"{source.folder}: {name}.weight has shape {found}, config.json asks for {wanted}")
        return replace(linear, bias=f"{name}.bias" in source.names())

    own = tuple(replace(group, linears=tuple(map(checked, group.linears))) for group in groups)
    return BlockSpec(index, prefix, own, _NORMS)


ARCH = Qwen2VL()
