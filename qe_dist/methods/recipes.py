"""Named recipes, and recipes from a TOML file of the user's own.

Defaults follow Quant Experts (arXiv 2602.24059): total rank 64 in two halves, k = 32, 8 routed experts, plain
rounding below, per-output-channel weights and per-token activations; W3A16 in groups of 128. `qe-paper` is that
(with bf16 factors). `qe` is what measurements chose (docs/how/methods.md): GPTQ rounds, and the shared expert is an
adapter with 4-bit factors within a budget of bytes, given in each block where it does most good; a list of channels
stays in 16 bits beside the product, or, where activations have less than 8 bits, the model is rotated. `qe-extract` has
extracting experts.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qe_dist import methods
from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Arithmetic, Scheme
from qe_dist.core.suggest import suggestion
from qe_dist.methods.base import Budget, Compensation, Transform
from qe_dist.methods.channels.lists import ChannelLists
from qe_dist.methods.compensation.aser import ASER
from qe_dist.methods.compensation.cross_modal import CrossModal
from qe_dist.methods.compensation.lqer import LQER
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.compensation.quant_experts import QuantExperts
from qe_dist.methods.compensation.salient import Salient
from qe_dist.methods.quantizers.gptq import GPTQ
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.rotations.hadamard import Hadamard
from qe_dist.methods.transforms.awq import AWQ
from qe_dist.methods.transforms.masquant import MASQuant
from qe_dist.methods.transforms.mbq import MBQ
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.methods.transforms.smoothquant import SmoothQuant

RANK_64 = Budget(rank=64, capped=True)


def _recipe(scheme: str, transform: Transform, compensation: Compensation, budget: Budget = RANK_64) -> Recipe:
    return Recipe(Scheme.parse(scheme), transform, RoundToNearest(), compensation, budget)


def _ours(scheme: str) -> Recipe:
    """Chosen on development texts of a real model, for each arithmetic (docs/results/accuracy.md).

    Only channels whose norms have gains 16 times off the median are kept out of the rotation: mixing them ruins the
    bundled outlier model, and keeping out more than those costs real models most of what a rotation gains.
    """
    asked = Scheme.parse(scheme)
    recipe = Recipe(asked, NoTransform(), GPTQ(), QERA(), Budget(extra_bits=0.25, factor_bits=4))
    if asked.arithmetic == "a16" or asked.act_bits == 8:
        return replace(recipe, channels=ChannelLists())
    return replace(recipe, rotation=Hadamard(octaves=8.0), budget=replace(recipe.budget, extra_bits=0.45))


METHODS: dict[str, Callable[[str], Recipe]] = {
    "rtn": lambda s: _recipe(s, NoTransform(), NoCompensation()),
    "smoothquant": lambda s: _recipe(s, SmoothQuant(), NoCompensation()),
    "hadamard": lambda s: replace(_recipe(s, NoTransform(), NoCompensation()), rotation=Hadamard()),
    "lqer": lambda s: _recipe(s, NoTransform(), LQER("identity")),
    "l2qer": lambda s: _recipe(s, NoTransform(), LQER("mean_abs")),
    "qera-approx": lambda s: _recipe(s, NoTransform(), QERA("diagonal")),
    "qera": lambda s: _recipe(s, NoTransform(), QERA("exact")),
    "aser": lambda s: _recipe(s, OutlierSmoothing(rank_by="mean"), ASER()),
    "serq": lambda s: _recipe(s, SmoothQuant(alpha=1.0), Salient(), Budget(rank=128, factor_bits=4, capped=True)),
    "awq": lambda s: _recipe(s, AWQ(), NoCompensation()),
    "mbq": lambda s: _recipe(s, MBQ(), NoCompensation()),
    "masquant": lambda s: _recipe(s, MASQuant(), CrossModal(), Budget(ratio=0.05)),
    "qe-paper": lambda s: _recipe(s, OutlierSmoothing(), QuantExperts()),
    "qe-extract": lambda s: _recipe(s, NoTransform(), QuantExperts(extract=True), replace(RANK_64, factor_bits=8)),
    "qe": _ours,
}
SCHEMES = {"w4a8": "w4a8", "w4a6": "w4a6", "w4a4": "w4a4", "w4a16": "w4a16g128", "w3a16": "w3a16g128"}
"""Number formats under the names that the field uses; where only weights are rounded, scale groups have 128 inputs."""
RECIPES: dict[str, Recipe] = {f"{m}-{s}": make(scheme) for m, make in METHODS.items() for s, scheme in SCHEMES.items()}


def arithmetics() -> dict[tuple[Arithmetic, ...], list[str]]:
    """What the product of every whole recipe executes: an arithmetic for each of SCHEMES -> the recipes of METHODS."""
    found: dict[tuple[Arithmetic, ...], list[str]] = {}
    for method in METHODS:
        executed = tuple(RECIPES[f"{method}-{scheme}"].scheme.arithmetic for scheme in SCHEMES)
        found.setdefault(executed, []).append(method)
    return found


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name, or one read from a TOML file.

    A name is PARTS-FORMAT or PARTS-FORMAT@BITS: a recipe of METHODS, members of any axes, or both, joined by +; the
    number format; the bits per weight that the repair may take, in int8, or in another size (@0.5f4, @0.5f16).
    `aser+gptq-w4a6@0.5` is ASER over GPTQ with half a bit. Under `+tune`, RTN's scales are signed (`full_range`), which
    is where rounding is best learned from.
    """
    if not name_or_path.endswith(".toml"):
        return _named(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"the recipe {path} does not exist; expected a TOML file or a name such as qe-w4a6")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    try:
        return recipe_from(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _named(name: str) -> Recipe:
    main, at, bits = name.partition("@")
    parts, _, scheme = main.rpartition("-")
    try:
        first, *others = parts.split("+")
        recipe = METHODS["rtn" if first not in METHODS else first](SCHEMES.get(scheme, scheme))
        recipe = _with_members(recipe, others if first in METHODS else [first, *others])
        if recipe.tuning is not None and recipe.quantizer == RoundToNearest():
            recipe = replace(recipe, quantizer=RoundToNearest(full_range=True))
        if not at:
            return recipe
        extra, _, factor_bits = bits.partition("f")
        budget = Budget(extra_bits=float(extra), factor_bits=int(factor_bits or min(8, recipe.budget.factor_bits)))
        return replace(recipe, budget=budget)
    except ValueError as error:
        raise ConfigError(
            f"there is no recipe {name!r}: {error}. A recipe is a .toml file or a name such as qe-w4a6, "
            f"smoothquant+gptq-w4a8 or qera-w3a16@0.5, of {', '.join(METHODS)} and what `qe-dist compare --list` shows"
        ) from None


def _with_members(recipe: Recipe, members: Sequence[str]) -> Recipe:
    """The recipe with these methods on the axes that it leaves open."""
    default = METHODS["rtn"](str(recipe.scheme))
    taken = {a: type(getattr(recipe, a)).__name__ for a in methods.FOLDERS if getattr(recipe, a) != getattr(default, a)}
    for member in members:
        axis = next((a for a in methods.FOLDERS if member in methods.names(a)), None)
        if axis is None:
            known = [*METHODS, *(name for a in methods.FOLDERS for name in methods.names(a))]
            raise ConfigError(f"nothing is called {member!r}{suggestion(member, known)}")
        if axis in taken:
            raise ConfigError(f"{taken[axis]} and {member} are both a {axis}; a recipe has one")
        taken[axis] = member
        recipe = replace(recipe, **{axis: methods.get(axis, member)()})
    return recipe


def recipe_from(content: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.describe`; members left out are `none`, `rtn` and `none`, without lists of channels,
    rotation and tuning."""
    known = {
        "scheme",
        "transform",
        "quantizer",
        "compensation",
        "channels",
        "budget",
        "granularity",
        "rotation",
        "tuning",
    }
    _refuse_unknown("recipe", content, known)
    if "scheme" not in content:
        raise ConfigError('a recipe needs a scheme, such as scheme = "w4a6"')
    granularity = content.get("granularity", "group")
    if granularity not in ("group", "linear"):
        raise ConfigError(f"granularity must be group or linear, found {granularity!r}")
    defaults = {"transform": "none", "quantizer": "rtn", "compensation": "none"}
    members = {axis: _member(axis, content.get(axis, {}), name) for axis, name in defaults.items()}
    for axis, name in (("channels", "lists"), ("rotation", "hadamard"), ("tuning", "tune")):
        if axis in content:
            members[axis] = _member(axis, content[axis], name)
    budget = _build(Budget, "budget", content.get("budget", vars(RANK_64)))
    return Recipe(Scheme.parse(str(content["scheme"])), **members, budget=budget, granularity=granularity)


def _member(axis: str, content: Any, default: str) -> Any:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{axis} must be a table with a name, found {content!r}")
    settings = dict(content)
    return _build(methods.get(axis, str(settings.pop("name", default))), axis, settings)


def _build(cls: type[Any], where: str, content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} must be a table, found {content!r}")
    hints = typing.get_type_hints(cls)
    _refuse_unknown(where, content, {f.name for f in dataclasses.fields(cls)})
    settings = {}
    for name, value in content.items():
        hint = hints[name]
        if not _fits(value, hint):
            raise ConfigError(f"{where}.{name} must be {_readable(hint)}, found {value!r}")
        is_whole = type(value) is int and float in (hint, *typing.get_args(hint))
        settings[name] = float(value) if is_whole else value
    return cls(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value has the type of a field: plain types, Literal, and unions of them."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_args(hint):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _readable(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = [_readable(option) for option in typing.get_args(hint) if option is not type(None)]
    return " or ".join(names) if names else hint.__name__


def _refuse_unknown(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        meant = suggestion(unknown[0], known)
        raise ConfigError(f"{where} has no {unknown[0]!r}{meant}; known are: {', '.join(sorted(known))}")
