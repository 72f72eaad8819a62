"""What is special to a model is said in archs/: the rest of the library asks the architecture."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from qe_dist import archs

ROOT = Path(__file__).parents[2]
ARCHS = ROOT / "qe_dist/archs"
ROOMS = ("qe_dist", "cluster", "pipelines", "kernels")
MODELS = sorted({part for name in archs.names() for part in (name, name.partition("_")[0])})
SPECIAL = re.compile(
    rf"{'|'.join(MODELS)}|\bvisual\b|vision_config|_token_ids?\b|mm_token_type|pixel_values|_grid_thw|merge_size"
    r"|AutoModel|language_model",
    re.IGNORECASE,
)


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names and strings of a file, with their lines; docstrings and comments may cite models."""
    told = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) in told:
            continue
        match node:
            case ast.Constant(value=str(word)) | ast.Name(id=word) | ast.Attribute(attr=word):
                yield node.lineno, word
            case ast.arg(arg=word) | ast.alias(name=word) | ast.ImportFrom(module=str(word)):
                yield node.lineno, word
            case ast.keyword(arg=str(word)):
                yield node.lineno, word


def leaks(text: str) -> list[tuple[int, str]]:
    return sorted({(line, word) for line, word in words(ast.parse(text)) if SPECIAL.search(word)})


def test_nothing_outside_archs_names_a_model_a_vision_tower_or_a_field_of_a_processor() -> None:
    files = [
        path for room in ROOMS for path in (ROOT / room).rglob("*.py") if ROOT / "qe_dist/archs" not in path.parents
    ]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): leaks(path.read_text(encoding="utf-8")) for path in files}
    assert {path: those for path, those in found.items() if those} == {}


def test_the_search_finds_what_leaked_before() -> None:
    for code in ('"visual" in prefix', "config.image_token_id", '"vision_config" not in config', "Qwen2VLConfig()"):
        assert leaks(code)
    assert leaks("from transformers import AutoModelForImageTextToText")
    assert leaks("f(mm_token_type_ids=1)")
    assert leaks('"""Qwen2-VL."""') == []
