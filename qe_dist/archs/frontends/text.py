"""A model of text only: the embeddings are all that stands in front of its blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qe_dist.archs.base import Frontend
from qe_dist.core.sample import Example


class TextFrontend(Frontend):
    auto_class = "AutoModelForCausalLM"
    decoder, unquantized, modality_argument = "", (), None

    def stream_writers(self, config: Any) -> tuple[str, ...]:
        return ()

    def has_vision(self, config: Mapping[str, Any]) -> bool:
        return False

    def images(self, folder: Path, config: Any) -> None:
        return None

    def image_ids(self, config: Any) -> tuple[int, ...]:
        return ()

    def vision_heads(self, config: Any) -> int:
        return 0

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        return {"input_ids": pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad)}
