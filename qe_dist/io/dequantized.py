"""Models whose weights are stored in fp8, as the full-precision models that they stand for.

A weight in fp8 has a scale beside it: one number, one per output channel, or one per block of the matrix. That covers
DeepSeek's and Qwen's `fp8` (`weight_scale_inv` for blocks of 128 x 128), `compressed-tensors` with fp8 weights,
`fbgemm_fp8` and NVIDIA's `modelopt` FP8: `weight * scale`, which is what their loaders compute. Every other quantized
model is refused: its full-precision source is better, and is what our methods are made for.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.weights import SafetensorsSource

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
"""What is appended to a weight's name for its scale; a product, in spite of the name."""
OF_FP8 = (*(f"weight{end}" for end in SCALES), "input_scale", "activation_scale", "k_scale", "v_scale")
"""Last parts of the names of tensors that only an fp8 loader reads."""
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
PACKED = {
    "qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "SCB": "bitsandbytes", "absmax": "bitsandbytes",
    "weight_blocks": "MXFP4", "qzeros": "GPTQ or AWQ",
}  # fmt: skip
"""Last part of a tensor's name -> what makes such tensors."""
FULL = "give the full-precision model that it was made of"
NAMED_BY_FILE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where older tools say how they quantized."""


def dequantized(source: SafetensorsSource) -> "SafetensorsSource | DequantizedSource":
    """The model in full precision: `source` itself, or its fp8 weights with their scales applied.

    Raises ConfigError for a model that is quantized in another way, our own checkpoints among them.
    """
    said = quantization(source.config)
    method = said.get("quant_method") if said is not None else None
    place = source.shown()
    if method == "qe":
        raise ConfigError(
            f"{place} is a checkpoint that qe-dist made; give the full-precision model that it was made of "
            "(qe_manifest.json has its fingerprint)"
        )
    packed = next((name for name in source.names() if name.rpartition(".")[2] in PACKED), None)
    if packed is not None:
        maker = PACKED[packed.rpartition(".")[2]]
        raise ConfigError(f"{place} is quantized by {method or maker} already ({packed}); {FULL}")
    small = [name for name in source.names() if source.dtype(name) in FP8]
    if not small and said is None:
        found = next((name for name in NAMED_BY_FILE if (source.folder / name).is_file()), None)
        if found is not None:
            raise ConfigError(f"{place} is quantized already, as its {found} says; {FULL}")
        return source
    if method not in (None, *METHODS) or not small:
        raise ConfigError(f"{place} is quantized by {method or 'an unknown method'} already; {FULL}")
    return DequantizedSource(source, small, _block(said or {}))


def has_fp8(source: SafetensorsSource) -> bool:
    """Whether some weights are stored in fp8."""
    return any(source.dtype(name) in FP8 for name in source.names())


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a config.json says that its model is quantized: at the top, or, in some models with images, in
    `text_config`."""
    for place in (config, config.get("text_config")):
        found = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return None


def _block(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where a config does not say."""
    groups = said.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
    for found in (said.get("weight_block_size"), *(one.get("block_structure") for one in weights)):
        if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
            return found[0], found[1]
    return None


class DequantizedSource:
    """The weights of an fp8 model in the type of the rest of the model, without their scales.

    small: names of the tensors in fp8. block: rows and columns that share a scale. Raises CheckpointError for a tensor
    without a scale, or with one of another shape.
    """

    def __init__(self, source: SafetensorsSource, small: Collection[str], block: tuple[int, int] | None) -> None:
        self.source, self.block, self.folder = source, block, source.folder
        self.config = _plain(source.config)
        others = [source.dtype(n) for n in source.names() if n.endswith("norm.weight")]
        self.result = others[0] if others and others[0] not in FP8 else torch.bfloat16
        self._scale = {name: self._checked(name) for name in small}
        dropped = {name for name in source.names() if name.rpartition(".")[2] in OF_FP8} | {*self._scale.values()}
        self._names = [name for name in source.names() if name not in dropped]
        self.notes = (
            *source.notes,
            f"{source.shown()} has {len(small)} weights in fp8; what they stand for, in {self.result}, is quantized",
        )

    def _checked(self, name: str) -> str:
        """The name of a tensor's scale."""
        source = self.source
        scale = next((name + end for end in SCALES if name + end in source.names()), None)
        if scale is None:
            raise CheckpointError(
                f"{source.shown()} has {name} in fp8 and neither {name}{SCALES[0]} nor {name}{SCALES[1]} beside it; "
                + FULL
            )
        shape, found = source.shape(name), source.shape(scale)
        if found not in self._possible(shape):
            raise CheckpointError(
                f"{source.shown()}: {scale} has shape {found}; for {name} of shape {shape} it is one number, one per "
                f"output channel, or one per block (config.json says blocks of {self.block})"
            )
        return scale

    def _possible(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        possible = [(), (1,), (*shape[:-1], 1), shape[:-1]]
        if self.block is not None and len(shape) >= 2:
            blocks = (-(-size // step) for size, step in zip(shape[-2:], self.block, strict=True))
            possible.append((*shape[:-2], *blocks))
        return possible

    def shown(self, name: str = "") -> str:
        """How a message names a file of the model, or its folder."""
        return self.source.shown(name)

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type of what `get` returns."""
        return self.result if name in self._scale else self.source.dtype(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal to the bit."""
        pair = [self.source.dtype(name) for name in (one, other)]
        if not any(name in self._scale for name in (one, other)):
            return self.source.same(one, other)
        return pair[0] == pair[1] and torch.equal(self.get(one), self.get(other))

    def get(self, name: str) -> Tensor:
        tensor = self.source.get(name)
        if name not in self._scale:
            return tensor
        return dequantize(tensor, self.source.get(self._scale[name]), self.block).to(self.result)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read these tensors and their scales."""
        wanted = list(names)
        self.source.prefetch([*wanted, *(self._scale[name] for name in wanted if name in self._scale)])


def dequantize(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """fp8 codes times their scales, in float32.

    codes: [..., O, I]. scale: one number, one per output channel ([O] or [O, 1]), or [..., O / block, I / block].
    """
    values, factor = codes.to(torch.float32), scale.to(torch.float32)
    if factor.numel() == 1:
        return values * factor.reshape(())
    if factor.ndim == values.ndim - 1:
        factor = factor.unsqueeze(-1)
    if factor.shape[-2:] == (values.shape[-2], 1):
        return values * factor
    rows, columns = block or (1, 1)
    wide = factor.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return values * wide[..., : values.shape[-2], : values.shape[-1]]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the quantization."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), Mapping):
        inner = plain["text_config"]
        plain["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    return plain
