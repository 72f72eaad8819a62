"""Embeddings and vision tower: the Hugging Face model itself, its blocks replaced by a catcher."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from qe_dist.archs.shared.modules import Catcher, empty, fill
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.sample import Example
from qe_dist.core.source import WeightSource

if TYPE_CHECKING:
    from qe_dist.archs.base import Family


class HFPrelude:
    def __init__(self, arch: "Family", source: WeightSource, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModel

        config = arch.hf_config(source.config)
        text = config.get_text_config()
        text.num_hidden_layers, text.layer_types = 1, ["full_attention"]  # of the block that the catcher replaces
        model = empty(lambda: AutoModel.from_config(config), include_buffers=False)
        decoder = model.get_submodule(arch.frontend.decoder.removesuffix("."))
        self.catcher = Catcher(decoder)
        decoder.layers, decoder.norm = nn.ModuleList([self.catcher]), nn.Identity()
        disk = {n: arch.disk_name(n, source) for n, _ in model.named_parameters()}
        self.model = fill(model, source, disk, device, dtype)
        self.arch, self.device = arch, device
        pad = text.pad_token_id  # -1, in early configs of Llama, is no row of the embeddings
        self.pad = pad if pad is not None and 0 <= pad < text.vocab_size else 0

    def __call__(self, examples: Sequence[Example], index: int) -> Batch:
        inputs = self.arch.model_inputs(examples, self.pad)
        hidden, given = self.catcher.run(self.model, {k: v.to(self.device) for k, v in inputs.items()})
        context = {name: tensor.cpu() for name, tensor in self.arch.decoder.context(given).items()}
        modality = pad_sequence([e.modality for e in examples], batch_first=True, padding_value=PADDING)
        return Batch(index, hidden.cpu(), modality, torch.tensor([e.index for e in examples]), context)
