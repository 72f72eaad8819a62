"""What docs/ says of the code is so: quoted files, the names of all methods, and that a method is one file."""

import importlib
import itertools
import re
import sys
import tomllib
from pathlib import Path

import pytest
from qe_pipelines import main

from qe_dist import methods
from qe_dist.methods import compensation
from qe_dist.methods.recipes import METHODS, load_recipe, recipe_from

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/**/*.md"))
READ = [
    ROOT / "README.md",
    *(doc for part in ("guides", "how", "reference") for doc in DOCS if doc.parent.name == part),
]
"""What a user reads; docs/results are tables to look things up in."""
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
MOST_WORDS, MOST_LINES = 15_000, 200
ADDING, ALL = ROOT / "docs" / "how" / "adding-a-method.md", ROOT / "docs" / "how" / "methods.md"
CHOOSING = ROOT / "docs" / "guides" / "choosing-a-recipe.md"
QUOTED = re.compile(r"<!-- file: (\S+) -->\n+```python\n(.*?)```\n", re.DOTALL)
QUOTATIONS = [(doc, *quoted) for doc in DOCS for quoted in QUOTED.findall(doc.read_text(encoding="utf-8"))]
LONGEST = 80
RECIPE = re.compile(r"[a-z0-9_+-]+-w\d+a\d+[\w@.]*")
EXAMPLES = [
    (doc.name, name)
    for doc in PAGES
    for line in doc.read_text(encoding="utf-8").splitlines()
    if line.startswith("    ")
    for name in RECIPE.findall(line)
    if "mine" not in name
]


def test_a_user_reads_no_more_than_that() -> None:
    """A word has a letter or a digit, which the lines of a table have not."""
    words = {doc: len(re.findall(r"\S*\w\S*", doc.read_text(encoding="utf-8"))) for doc in READ}
    assert sum(words.values()) <= MOST_WORDS, words


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_readme_names_the_versions_that_are_taken() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {re.split(r"[<>=]", need)[0]: need for need in project["dependencies"]}
    oldest, below = re.fullmatch(r"transformers>=([\d.]+),<5\.(\d+)", needs["transformers"]).groups()
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"transformers {oldest} to 5.{int(below) - 1}." in readme
    assert f"torch {needs['torch'].removeprefix('torch>=')} or newer" in readme
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer, Linux" in readme


def test_the_guide_shows_a_method() -> None:
    assert [path for doc, path, _ in QUOTATIONS if doc == ADDING] == ["qe_dist/methods/compensation/qera.py"]


@pytest.mark.parametrize(("doc", "path", "code"), QUOTATIONS, ids=lambda x: x.name if isinstance(x, Path) else "")
def test_quoted_code_is_the_file(doc: Path, path: str, code: str) -> None:
    assert code == (ROOT / path).read_text(encoding="utf-8"), f"stale {doc}: run python benchmarks/tables.py"


def test_the_method_that_is_shown_is_short() -> None:
    assert all(len(code.splitlines()) < LONGEST for doc, _, code in QUOTATIONS if doc == ADDING)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKED = [*PAGES, *ROOT.glob("models/**/*.md"), ROOT / "dev" / "LOG.md"]


@pytest.mark.parametrize("doc", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(doc: Path) -> None:
    broken = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", doc.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        page = doc.parent / name if name else doc
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(target)
    assert broken == []


FOLDERS = ("qe_dist", "kernels", "cluster", "pipelines", "benchmarks", "tests", "examples", "models", "training")
CODE = [path for folder in FOLDERS for ending in ("py", "yaml") for path in ROOT.glob(f"{folder}/**/*.{ending}")]


def test_pages_that_the_code_names_exist() -> None:
    named = {(path, page) for path in CODE for page in re.findall(r"\b(?:docs|dev)/[\w/-]+\.md", path.read_text())}
    assert named
    assert sorted(f"{path}: {page}" for path, page in named if not (ROOT / page).exists()) == []


def test_the_code_cites_no_document_that_is_not_here() -> None:
    outside = re.compile(r"\b(?:DESIGN|methods\.md|kernels\.md) (?:sections? )?\d")
    assert [str(path) for path in CODE if path != Path(__file__) and outside.search(path.read_text())] == []


def test_every_method_and_recipe_is_described() -> None:
    text = ALL.read_text(encoding="utf-8")
    names = {*METHODS, *(name for axis in methods.FOLDERS for name in methods.names(axis))}
    assert sorted(name for name in names if f"`{name}`" not in text) == []


@pytest.mark.parametrize(("doc", "name"), sorted(set(EXAMPLES)))
def test_the_recipes_of_examples_exist(doc: str, name: str) -> None:
    load_recipe(name)


def test_the_file_in_the_guide_is_the_recipe_that_it_says(tmp_path: Path) -> None:
    lines = CHOOSING.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    scheme = "))
    block = itertools.takewhile(lambda line: line.startswith("    "), lines[start:])
    path = tmp_path / "guide.toml"
    path.write_text("\n".join(block), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe("qe-w4a6")


@pytest.fixture
def newone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The method that the guide shows, as a file of another name that nothing else knows of."""
    code = next(code for doc, _, code in QUOTATIONS if doc == ADDING)
    (tmp_path / "newone.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(compensation, "__path__", [*compensation.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("qe_dist.methods.compensation.newone", None)
    vars(compensation).pop("newone", None)


@pytest.mark.usefixtures("newone")
def test_a_new_file_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["qe-dist", "compare", "--list"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0
    assert "newone" in re.split(r"\W+", capsys.readouterr().out)


@pytest.mark.usefixtures("newone")
@pytest.mark.parametrize("name", ["newone-w4a6", "smoothquant+newone+gptq-w4a6@0.5"])
def test_a_new_file_is_a_part_of_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.describe()["compensation"] == {"name": "newone", "metric": "exact"}
    assert recipe_from(recipe.describe()) == recipe


def test_without_the_file_there_is_no_such_recipe() -> None:
    """Else the tests above would pass on anything."""
    assert "newone" not in methods.names("compensation")
