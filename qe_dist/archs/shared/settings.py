"""Checks that a `config.json` says what its family needs, in itself; each fault is named by file and field."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qe_dist.archs.base import Family
from qe_dist.core.errors import ConfigError

PARTS = ("text_config", "vision_config")


def check_settings(arch: Family, config: Mapping[str, Any], shown: str) -> None:
    """shown: how messages name the file. Raises ConfigError for the first fault."""
    for name in PARTS:
        if not isinstance(config.get(name, {}), Mapping | None):
            raise ConfigError(f"{shown}: {name} must be an object, found {str(config[name])[:40]}")
        if name == "vision_config" and name in arch.tiny and not config.get(name):
            raise ConfigError(f"{shown} has no {name}, which a {arch.name} needs; copy it from the model's own")
    try:
        fault = next(_faults(arch, config), None)
        variants = [] if fault else [*_class(arch, config), *arch.decoder.unsupported(arch.text(config))]
    except Exception as error:  # transformers checks each field, with exceptions of many kinds
        raise ConfigError(f"{shown} is no config of a {arch.name}: {shortened(error)}") from error
    if fault is not None:
        raise ConfigError(f"{shown}: {fault}")
    for variant in variants:
        raise ConfigError(f"{shown} asks for a variant of {arch.name} that is not supported: {variant[:200]}")


def _class(arch: Family, config: Mapping[str, Any]) -> Iterator[str]:
    known, found = arch.tiny["architectures"], config.get("architectures")
    if found and list(found) != known:
        yield f"architectures {', '.join(found)}; supported is {known[0]}"


def shortened(error: BaseException) -> str:
    """Kind and last line of an error of others, which may quote a whole file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200] if lines else 'no reason given'}"


def _faults(arch: Family, config: Mapping[str, Any]) -> Iterator[str]:
    yield from _layers(config)
    yield from _kinds(config)
    text = arch.text(config)
    if type(text.num_hidden_layers) is not int or text.num_hidden_layers < 1:
        yield f"num_hidden_layers must be at least 1, found {text.num_hidden_layers!r}"
    yield from _rope(arch, text)
    yield from _tokens(config, text)


def _kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Fields that transformers takes as they are, and fails on when the weights are loaded."""
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        yield f"architectures must be a list of names, found {str(classes)[:40]!r}"
    for prefix, place in _places(config):
        for name in ("dtype", "torch_dtype"):
            dtype = place.get(name)
            known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
            if dtype not in (None, "auto") and not known:
                yield f"{prefix}{name} must be a type of torch such as bfloat16, found {str(dtype)[:40]!r}"


def _layers(config: Mapping[str, Any]) -> Iterator[str]:
    """A type for each layer; transformers names neither file nor field."""
    for prefix, place in _places(config):
        types, number = place.get("layer_types"), place.get("num_hidden_layers")
        if isinstance(types, list) and isinstance(number, int) and len(types) != number:
            yield (
                f"{prefix}layer_types has {len(types)} entries, {prefix}num_hidden_layers is {number}; they must be "
                "equal"
            )


def _rope(arch: Family, text: Any) -> Iterator[str]:
    """What the rotary tables of the family are made of. Its tiny configuration has all there must be."""
    tiny = arch.tiny.get("text_config", arch.tiny).get("rope_parameters", {})
    found = getattr(text, "rope_parameters", None) or {}
    for name in sorted(tiny.keys() - found.keys()):
        yield (
            f"rope_parameters (older: rope_scaling, rope_theta) lacks {name}, which a {arch.name} needs; copy it from "
            "the model's own config.json"
        )
    theta = found.get("rope_theta", 1.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        yield f"rope_theta must be a number above 0, found {str(theta)[:40]!r}"
    sections = found.get("mrope_section")
    if sections is not None:
        width = int(arch.decoder.head_width(text) * found.get("partial_rotary_factor", 1.0))
        numbers = isinstance(sections, list | tuple) and all(type(n) is int and n >= 0 for n in sections)
        if not numbers or 2 * sum(sections) != width:
            yield f"mrope_section is {str(sections)[:40]}; its sum must be half of the {width} rotary channels"


def _tokens(config: Mapping[str, Any], text: Any) -> Iterator[str]:
    """Placeholders of images, and what ends an answer, must be rows of the embeddings."""
    for name, token in config.items():
        of_vision = name.endswith(("_token_id", "_token_index")) and name.startswith(("image", "video", "vision"))
        if of_vision and isinstance(token, int) and not 0 <= token < text.vocab_size:
            yield f"{name} is {token}, which is no row of a vocabulary of {text.vocab_size} (vocab_size)"

    ends = text.eos_token_id
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and not (isinstance(token, int) and 0 <= token < text.vocab_size):
            given = any("eos_token_id" in place for _, place in _places(config))
            said = (
                f"eos_token_id is {str(token)[:40]}"
                if given
                else f"eos_token_id is missing, for which {token} is taken"
            )
            yield f"{said}, which is no row of a vocabulary of {text.vocab_size}: no answer would end"


def fields_of(arch: Family, config: Mapping[str, Any], found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The settings that most likely ask for a shape that files do not have, to be put behind a message."""
    if len(found) != len(wanted):
        return ""
    sizes = {w for f, w in zip(found, wanted, strict=True) if f != w}
    fields = [f"{prefix}{name}" for prefix, place in _places(config) for name, n in place.items() if _is(n, sizes)]
    if not fields:
        text = arch.text(config)
        heads = {n: getattr(text, n, None) for n in ("num_attention_heads", "num_key_value_heads")}
        width = arch.decoder.head_width(text)
        fields = [n for n, count in heads.items() if isinstance(count, int) and count * width in sizes]
    return f" ({', '.join(fields)})" if fields else ""


def _is(value: Any, sizes: set[int]) -> bool:
    return type(value) is int and value in sizes


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for name in PARTS:
        if isinstance(config.get(name), Mapping):
            yield f"{name}.", config[name]
