"""Checks that a `config.json` says what its family needs, in itself; each fault is named by file and field."""

from collections.abc import Iterator, Mapping
from typing import Any

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
    for fault in _layers(config):
        raise ConfigError(f"{shown}: {fault}")
    try:
        text = arch.text(config)
        number = text.num_hidden_layers
    except Exception as error:  # transformers checks each field, with exceptions of many kinds
        said = " ".join(str(error).split())
        raise ConfigError(f"{shown} is no config of a {arch.name}: {type(error).__name__}: {said[:200]}") from error
    if type(number) is not int or number < 1:
        raise ConfigError(f"{shown}: num_hidden_layers must be at least 1, found {number!r}")
    for fault in (*_rope(arch, text), *_tokens(config, text)):
        raise ConfigError(f"{shown}: {fault}")
    for fault in (*_class(arch, config), *arch.decoder.unsupported(text)):
        raise ConfigError(f"{shown} asks for a variant of {arch.name} that is not supported: {fault}")


def _class(arch: Family, config: Mapping[str, Any]) -> Iterator[str]:
    known, found = arch.tiny["architectures"], config.get("architectures")
    if found and list(found) != known:
        yield f"architectures {', '.join(found)}; supported is {known[0]}"


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
        yield f"rope_theta must be a number above 0, found {theta!r}"
    sections = found.get("mrope_section")
    if sections is not None:
        width = int(arch.decoder.head_width(text) * found.get("partial_rotary_factor", 1.0))
        if not isinstance(sections, list | tuple) or 2 * sum(sections) != width:
            yield f"mrope_section is {sections}; its sum must be half of the {width} rotary channels of a head"


def _tokens(config: Mapping[str, Any], text: Any) -> Iterator[str]:
    """Placeholders of images must be rows of the embeddings."""
    for name, token in config.items():
        of_vision = name.endswith(("_token_id", "_token_index")) and name.startswith(("image", "video", "vision"))
        if of_vision and isinstance(token, int) and not 0 <= token < text.vocab_size:
            yield f"{name} is {token}, which is no row of a vocabulary of {text.vocab_size} (vocab_size)"


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
