"""What docs/reference says of commands and recipes, taken from the code. `benchmarks/tables.py` puts it there."""

import ast
import dataclasses
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qe_pipelines.main import app
from qe_pipelines.reading import options_of_reading
from typer.main import get_command

from qe_dist import methods
from qe_dist.methods.base import Budget
from qe_dist.methods.recipes import METHODS, load_recipe

AXES = {
    "rotation": "Rotations of the whole model",
    "transform": "Transforms of a group's input",
    "channels": "Lists of channels",
    "quantizer": "Quantizers of weights",
    "compensation": "Compensations of the error",
    "tuning": "Tuning of whole blocks",
}
SHOWN = "w4a6"
"""The number format by which whole recipes are shown."""


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In markdown; cells may hold any text."""
    lines = [header, tuple("---" for _ in header), *(tuple(_cell(cell) for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def commands() -> str:
    """Every command of `qe-dist`: what it does, its arguments and options. Those of reading samples are said once."""
    parts, last = [], []
    header, common = ("argument or option", "default", "meaning"), inspect.signature(options_of_reading).parameters
    for name, command in sorted(get_command(app).commands.items()):
        shown = [parameter for parameter in command.params if parameter.name != "help"]
        arguments = " ".join(_argument(parameter) for parameter in shown if not parameter.opts[0].startswith("-"))
        text = inspect.cleandoc(command.help).replace("\n\n", "\n").replace("\n", " ")
        own = [parameter for parameter in shown if parameter.name not in common]
        reads = [parameter for parameter in shown if parameter.name in common]
        rows = _rows(own) + ([("…", "", "[samples](#reading-samples)")] if reads else [])
        last = reads or last
        parts.append(f"## {name}\n\n    qe-dist {name} {arguments}".rstrip() + f"\n\n{text}\n\n{table(header, rows)}")
    parts.append(f"## Reading samples\n\n{table(header, _rows(last))}")
    return "\n" + "\n".join(parts)


def _rows(parameters: Sequence[Any]) -> list[tuple[str, ...]]:
    return [(f"`{_name(parameter)}`", _default(parameter), parameter.help or "") for parameter in parameters]


def members() -> str:
    """Every member of every axis, with its settings."""
    parts = []
    for axis, title in AXES.items():
        rows = [(f"`{name}`", *_described(methods.get(axis, name))) for name in methods.names(axis)]
        parts.append(f"## {title}\n\n`[{axis}]` in a file\n\n{table(('name', 'what it is', 'settings'), rows)}")
    rows = [(f"`{field.name}`", _value(field.default), _documented(Budget)[field.name]) for field in _fields(Budget)]
    parts.append(f"## The budget\n\n`[budget]` in a file\n\n{table(('setting', 'default', 'meaning'), rows)}")
    return "\n" + "\n".join(parts)


def whole() -> str:
    """Every whole recipe, as its parts."""
    rows = []
    for name in METHODS:
        told = load_recipe(f"{name}-{SHOWN}").describe()
        budget = "" if told["compensation"]["name"] == "none" else _part(told["budget"])
        rows.append((f"`{name}`", *(_part(told.get(axis)) for axis in AXES), budget))
    return "\n" + table(("recipe", *AXES, "budget"), rows)


def _name(parameter: Any) -> str:
    first = parameter.opts[0]
    return first if first.startswith("-") else first.upper()


def _argument(parameter: Any) -> str:
    return _name(parameter) if parameter.required else f"[{_name(parameter)}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    unset = parameter.default is None or parameter.default is False or parameter.default == ""
    return "" if unset else f"`{parameter.default}`"


def _described(cls: type[Any]) -> tuple[str, str]:
    first = inspect.cleandoc(cls.__doc__).partition("\n\n")[0].replace("\n", " ")
    return first, ", ".join(f"`{field.name}` = {_value(field.default)}" for field in _fields(cls))


def _fields(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(field for field in dataclasses.fields(cls) if field.init)


def _value(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _documented(cls: type[Any]) -> dict[str, str]:
    """The string below each field, where there is one."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    texts = dict.fromkeys((field.name for field in _fields(cls)), "")
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(inspect.cleandoc(text.value.value).split())
    return texts


def _part(told: Any) -> str:
    """Name first; a setting that is not there or null is left out."""
    if told is None:
        return ""
    settings = {name: value for name, value in told.items() if name != "name" and value is not None}
    values = ", ".join(f"{name} {str(value).lower()}" for name, value in settings.items())
    name = told.get("name")
    return values if name is None else name + (f" ({values})" if values else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
