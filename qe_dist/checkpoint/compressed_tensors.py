"""A block of ours as other engines read it: plain compressed-tensors weights, and what may repair them as a LoRA.

Those engines know no x~ = x / s. What makes x channel by channel (`Feeder`) divides it for good: the weight of a norm,
or the rows of v and up, that is their scales, biases and up matrices. Under grouped-query attention a head of v feeds
several heads of o's input; where their s differ, nothing in front of o can divide it, and o is written in 16 bits.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int8, Int32
from torch import Tensor
from torch.nn.functional import one_hot, pad

from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import FORMAT, BlockLayout, GroupLayout
from qe_dist.core.quantized import Factor, GroupInput, input_from_tensors, repair_from_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import Feeder
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.packing import pack, unpack

GROUP_SIZES = (128, 64, 32)
"""Group sizes that Marlin takes, vLLM's kernel for every CUDA device since Turing; it takes -1 (a whole row), too."""
ROWS = 256
HELD = 0.5
"""Share of the size of an ordinary column: rounding cannot have left more of one whose codes are all zero."""


@dataclass(frozen=True)
class LinearFormat:
    """What `config.json` tells an engine about a linear."""

    bits: int
    """Bits of a stored code."""
    group_size: int | None
    act_bits: int | None

    @classmethod
    def of(cls, group: GroupLayout) -> "LinearFormat":
        """The one that holds a group exactly. ConfigError where there is none."""
        scheme = group.scheme
        size = scheme.group_size
        fits = size if size is None else next((known for known in GROUP_SIZES if size % known == 0), None)
        if size is not None and fits is None:
            raise ConfigError(
                f"scheme {scheme} has a scale for every {size} inputs, and stock kernels want {GROUP_SIZES[-1]}, 64 or "
                "128, or one per output; quantize with such a group size"
            )
        # An engine that rounds rounds whole tokens: the same only where no channel of theirs leaves the grid.
        whole = scheme.act_bits == 8 and scheme.dynamic_outliers is None and not group.extracts
        return cls(4 if scheme.weight_bits <= 4 else 8, fits, 8 if whole else None)

    def config(self, targets: Iterable[str]) -> dict[str, Any]:
        """A group of compressed-tensors' `config_groups`."""
        strategy = "channel" if self.group_size is None else "group"
        integers = {"type": "int", "symmetric": True}
        weights = integers | {"num_bits": self.bits, "strategy": strategy, "group_size": self.group_size}
        rounded = integers | {"num_bits": self.act_bits, "strategy": "token", "dynamic": True}
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": rounded if self.act_bits else None,
            "format": FORMAT,
        }


@dataclass(frozen=True)
class StoredLinear:
    """A linear of ours with its codes packed: most of them go on as they are, and unpacking takes minutes a block."""

    words: Int32[Tensor, "O W"]
    bits: int
    width: int
    scale: Float[Tensor, "O G"]
    bias: Tensor | None = None
    shared_up: Factor | None = None
    shared_columns: Float[Tensor, "O C"] | None = None
    salient_columns: Factor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], bits: int) -> "StoredLinear":
        """tensors: by their names within the linear."""
        repair = repair_from_tensors(tensors)
        static = {n: repair.get(n) for n in ("bias", "shared_up", "shared_columns", "salient_columns")}
        width = int(tensors["weight_shape"][1])
        return cls(tensors["weight_packed"], bits, width, tensors["weight_scale"], **static)

    def codes(self, rows: slice = slice(None)) -> Int8[Tensor, "_ I"]:
        return unpack(self.words[rows], self.bits, self.width)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        return dequantize(self.codes(), self.scale, dtype)


@dataclass
class ExportedBlock:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by their full names."""
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Linear (relative to the block) -> (down [R, I], up [O, R]) in float32."""
    dense: list[str] = field(default_factory=list)
    """Linears in 16 bits."""
    changed: Counter[str] = field(default_factory=Counter)
    """What is written otherwise than it was, in words -> in how many groups."""


def losses(group: GroupLayout, peft: bool) -> Counter[str]:
    """What of a group other engines will not do, in words; 1 each, to be counted over groups."""
    lost, scheme = [], group.scheme
    if group.routed:
        lost.append("routed experts")
    if group.static_rank and not peft:
        lost.append("the shared low-rank branch")
    if scheme.act_bits and LinearFormat.of(group).act_bits is None:
        lost.append(f"the speed of {scheme.act_bits}-bit activations, which stay in 16 bits (as exact or better)")
    return Counter(lost)


def why_not(group: GroupLayout, peft: bool) -> str | None:
    """Why other engines cannot have this group; None where they can, as far as names and shapes tell."""
    part = group.part
    if part.rotation:
        return (
            "its input is rotated at run time, which other engines do not do; quantize without, with "
            "online = false under [rotation]"
        )
    if part.by_modality:
        return "it treats text and image tokens differently, which layers of other engines do not see"
    if peft and part.num_experts:
        return "it has routed experts, and a LoRA is the same for every token; export with --base-only"
    if not peft and part.salient_channels is not None:
        return "weights of its loudest channels are partly beside the codes; what is left answers nonsense; use --peft"
    return None


def exported_block(
    prefix: str, layout: BlockLayout, tensors: Mapping[str, Tensor], feeders: Mapping[str, Feeder], peft: bool
) -> ExportedBlock:
    """All tensors of a block file, rewritten.

    prefix: of the block's tensors. peft: whether the adapters will be there.
    Raises ConfigError, with the name of the group, where no stock checkpoint says the same.
    """
    block = ExportedBlock()
    parts = {name: input_from_tensors(_within(tensors, f"{prefix}{name}_input.")) for name in layout.groups}
    linears = {name: _linears(prefix, group, tensors) for name, group in layout.groups.items()}
    by_linear = {n: x for group in linears.values() for n, x in group.items()}
    quantized = tuple(f"{prefix}{m}." for m in layout.modules)
    others = {name: t for name, t in tensors.items() if not name.startswith(quantized)}
    sizes = {m: len(x.words) for m, x in by_linear.items()}
    sizes |= {n.removeprefix(prefix).removesuffix(".weight"): len(t) for n, t in others.items()}
    factors, unfolded = _fold(prefix, parts, linears, feeders, sizes)
    block.tensors |= {
        n: _scaled(t, n.removeprefix(prefix).removesuffix(".weight"), factors, feeders) for n, t in others.items()
    }
    for name, group in layout.groups.items():
        if not peft:
            _refuse_empty_columns(f"{prefix}{name}", parts[name], linears[name])
        scheme, form, columns = group.scheme, LinearFormat.of(group), unfolded.get(name)
        block.changed += _changes(scheme, form, parts[name], columns)
        for module, linear in linears[name].items():
            rows = factors.get(module)
            written = (
                _packed(linear, rows, scheme.group_size, form) if columns is None else _dense(linear, rows, columns)
            )
            block.tensors |= {f"{prefix}{module}.{n}": t for n, t in written.items()}
            block.dense += [] if columns is None else [module]
            if peft:
                down, up = adapter(parts[name], linear)
                down = down if columns is None else (down.double() / columns).float()
                block.adapters[module] = down, up if rows is None else (up.double() / rows[:, None]).float()
    return block


def _changes(scheme: Scheme, form: LinearFormat, part: GroupInput, columns: Tensor | None) -> Counter[str]:
    told = []
    if columns is not None:
        told.append("weights in 16 bits: heads that share a head of keys and values are scaled differently")
    elif part.input_scale is not None:
        told.append("the scale of the input is in the norm or linear before it, rounded to bf16 there")
    if form.bits != scheme.weight_bits:
        told.append(f"{scheme.weight_bits}-bit codes take {form.bits} bits")
    if form.group_size != scheme.group_size:
        told.append(f"scales of groups of {scheme.group_size} are repeated for groups of {form.group_size}")
    return Counter(told)


def adapter(part: GroupInput, linear: StoredLinear) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """(down, up) of all that a linear adds to its codes for every token alike, on x~; of rank 0 where that is nothing.

    An extracted channel leaves the codes; theirs stay in a stock engine, so that the adapter has the difference.
    """
    outputs, width = len(linear.words), linear.width
    pairs = [(torch.zeros(0, width), torch.zeros(outputs, 0))]
    if part.shared_down is not None and linear.shared_up is not None:
        pairs.append((part.shared_down.dense, linear.shared_up.dense))
    if part.shared_channels is not None and linear.shared_columns is not None:
        channels = part.shared_channels.long()
        in_codes = linear.dense(torch.float32)[:, channels]
        pairs.append((one_hot(channels, width).float(), linear.shared_columns.float() - in_codes))
    if part.salient_channels is not None and linear.salient_columns is not None:
        pairs.append((one_hot(part.salient_channels.long(), width).float(), linear.salient_columns.dense))
    return torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)


def lora_tensors(pair: tuple[Tensor, Tensor], rank: int) -> dict[str, Tensor]:
    """The pair as PEFT names it, in bf16, with zeros up to the rank that all linears of the adapter share."""
    down, up = pair
    missing = rank - len(down)
    padded = {"lora_A.weight": pad(down, (0, 0, 0, missing)), "lora_B.weight": pad(up, (0, missing))}
    return {name: tensor.bfloat16() for name, tensor in padded.items()}


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _scaled(tensor: Tensor, module: str, factors: Mapping[str, Tensor], feeders: Mapping[str, Feeder]) -> Tensor:
    """A tensor in 16 bits: what makes a scaled input divides it, and what reads one undoes that."""
    feeder = feeders.get(module)
    if module in factors:
        offset = next(one.offset for one in feeders.values() if one.module == module)
        return ((tensor.double() + offset) / factors[module] - offset).to(tensor.dtype)
    if feeder is not None and feeder.module in factors:
        return (tensor.double() * factors[feeder.module]).to(tensor.dtype)
    return tensor


def _linears(prefix: str, group: GroupLayout, tensors: Mapping[str, Tensor]) -> dict[str, StoredLinear]:
    bits = group.scheme.weight_bits
    return {name: StoredLinear.of(_within(tensors, f"{prefix}{name}."), bits) for name in group.linears}


def _fold(
    prefix: str,
    parts: Mapping[str, GroupInput],
    linears: Mapping[str, Mapping[str, StoredLinear]],
    feeders: Mapping[str, Feeder],
    sizes: Mapping[str, int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(module -> what its outputs are divided by, group -> scale that nothing in front can take over), float64."""
    factors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    unfolded: dict[str, Tensor] = {}
    for name, part in parts.items():
        first = next(iter(linears[name].values()))
        scale = torch.ones(first.width) if part.input_scale is None else part.input_scale[0]
        for feeder in {feeders[module] for module in linears[name]}:
            factor = folded(scale.double(), feeder, sizes[feeder.module])
            if factor is None:  # one linear, o: nothing else reads heads
                unfolded[name] = scale.double()
            elif not torch.equal(factors.setdefault(feeder.module, factor), factor):
                raise ConfigError(
                    f"{prefix}{name} and {prefix}{owner[feeder.module]} want different scales of what "
                    f"{feeder.module} makes for both; quantize with granularity = group"
                )
            owner[feeder.module] = name
    return {m: f for m, f in factors.items() if not bool((f == 1).all())}, unfolded


def folded(scale: Float[Tensor, " I"], feeder: Feeder, outputs: int) -> Float[Tensor, " O"] | None:
    """The scale by outputs of the feeder; None where heads of the input that share one of its heads differ."""
    if feeder.head is None:
        return scale
    heads = scale.view(outputs // feeder.head, -1, feeder.head)
    return heads[:, 0].flatten() if bool((heads == heads[:, :1]).all()) else None


def _packed(linear: StoredLinear, rows: Tensor | None, group_size: int | None, form: LinearFormat) -> dict[str, Tensor]:
    scale = linear.scale
    if form.group_size is not None and group_size is not None:
        scale = scale.repeat_interleave(group_size // form.group_size, dim=1)
    if rows is not None:
        scale = (scale.double() / rows[:, None]).to(scale.dtype)
    return {
        "weight_packed": linear.words if form.bits == linear.bits else pack(linear.codes(), form.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor((len(linear.words), linear.width), dtype=torch.int64),
        **_bias(linear, rows),
    }


def _dense(linear: StoredLinear, rows: Tensor | None, columns: Tensor) -> dict[str, Tensor]:
    weight = linear.dense(torch.float64) / columns
    weight = weight if rows is None else weight / rows[:, None]
    return {"weight": weight.to(linear.scale.dtype), **_bias(linear, rows)}


def _bias(linear: StoredLinear, rows: Tensor | None) -> dict[str, Tensor]:
    if linear.bias is None:
        return {}
    return {"bias": linear.bias if rows is None else (linear.bias.double() / rows).to(linear.bias.dtype)}


def _refuse_empty_columns(name: str, part: GroupInput, linears: Mapping[str, StoredLinear]) -> None:
    """Channels that a method exempted from rounding: the codes have nothing of them, the repair has all."""
    empty = _empty_columns(linears.values())
    if not bool(empty.any()):
        return
    held = torch.cat([up @ down[:, empty] for down, up in (adapter(part, x) for x in linears.values())]).norm(dim=0)
    energies = [x.dense(torch.float32)[:, ~empty].square().sum(dim=0) for x in linears.values()]
    typical = torch.stack(energies).sum(dim=0).sqrt().mean()
    if count := int((held > HELD * typical).sum()):
        raise ConfigError(
            f"{name}: the codes have nothing of {count} of its {len(empty)} input channels, its most important ones, "
            "which the repair holds alone; without it the model answers nonsense. Export with --peft (recipes "
            "without routed experts), or quantize with a recipe that rounds all columns (qe, rtn, awq)"
        )


def _empty_columns(linears: Collection[StoredLinear]) -> Bool[Tensor, " I"]:
    """Input channels for which all codes are zero. Reads some rows; more only while there seem to be any."""
    empty = torch.ones(next(iter(linears)).width, dtype=torch.bool)
    for linear in linears:
        for start in range(0, len(linear.words), ROWS):
            if not bool(empty.any()):
                return empty
            empty &= ~linear.codes(slice(start, start + ROWS)).any(dim=0)
    return empty
