"""The way of Qwen2-VL and its successors to embed: a vision tower whose merger writes into the stream in place of image
tokens. Their towers differ; they are transformers' own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qe_dist.archs.base import Frontend
from qe_dist.core.errors import CheckpointError
from qe_dist.core.sample import Example, PixelBounds


class Qwen2VLImages:
    """The image processor of a model, from its folder.

    CheckpointError where there is none, or one that cuts images otherwise than the vision tower takes them.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        # Before 5.18, what transformers itself calls so wants torchvision.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            # Equal pixels on every machine; and before 5.18, transformers takes the other one without torchvision, too.
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: image processor cannot be loaded: {error}") from None
        self.token, tower = config.image_token_id, config.vision_config
        own = self.processor.patch_size, self.processor.merge_size
        wanted = tower.patch_size, tower.spatial_merge_size
        if own != wanted:
            raise CheckpointError(
                f"{folder}/preprocessor_config.json has (patch_size, merge_size) {own}, config.json has {wanted}; "
                "take both files from the same model"
            )

    def __call__(
        self, images: Sequence[Image.Image], bounds: Sequence[PixelBounds]
    ) -> tuple[Mapping[str, Tensor], list[int]]:
        found = [
            self.processor([image], return_tensors="pt", **self._size(bound))
            for image, bound in zip(images, bounds, strict=True)
        ]
        out = {name: torch.cat([one[name] for one in found]) for name in ("pixel_values", "image_grid_thw")}
        counts = out["image_grid_thw"].prod(dim=1) // self.processor.merge_size**2
        return out, counts.tolist()

    def _size(self, bound: PixelBounds) -> dict[str, Any]:
        """The processor's own bounds with those that a sample has in their place; what it calls edges are pixels."""
        own = {"shortest_edge": bound.least, "longest_edge": bound.most}
        given = {name: value for name, value in own.items() if value is not None}
        return {"size": dict(self.processor.size) | given} if given else {}


class Qwen2VLFrontend(Frontend):
    auto_class = "AutoModelForImageTextToText"
    decoder = "language_model."
    unquantized = (r"re:.*\bvisual\..*",)
    modality_argument = "mm_token_type_ids"

    def stream_writers(self, config: Any) -> tuple[str, ...]:
        return ("visual.merger.mlp.2",)

    def has_vision(self, config: Mapping[str, Any]) -> bool:
        return "vision_config" in config

    def images(self, folder: Path, config: Any) -> Qwen2VLImages:
        return Qwen2VLImages(folder, config)

    def image_ids(self, config: Any) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def vision_heads(self, config: Any) -> int:
        heads: int = config.vision_config.num_heads
        return heads

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        ids = pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad)
        modality = pad_sequence([e.modality for e in examples], batch_first=True, padding_value=0)
        inputs = {"input_ids": ids, "mm_token_type_ids": modality.int()}
        with_images = [e.vision for e in examples if e.vision]
        if with_images:
            inputs |= {k: torch.cat([v[k] for v in with_images]) for k in with_images[0]}
        return inputs


class Qwen35Frontend(Qwen2VLFrontend):
    def stream_writers(self, config: Any) -> tuple[str, ...]:
        return ("visual.merger.linear_fc2",)


class Qwen3VLFrontend(Qwen35Frontend):
    """The tower hands on features of some of its layers, too, each through a merger of its own."""

    def stream_writers(self, config: Any) -> tuple[str, ...]:
        taken = range(len(config.vision_config.deepstack_visual_indexes))
        more = (f"visual.deepstack_merger_list.{i}.linear_fc2" for i in taken)
        return (*super().stream_writers(config), *more)
