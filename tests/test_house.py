"""The house rules that a reader counts on and no linter checks."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "qe_dist"
KERNELS = ROOT / "kernels/qe_kernels"
PACKAGES = (LIBRARY, KERNELS, ROOT / "cluster/qe_cluster", ROOT / "pipelines/qe_pipelines")
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
GRAB_BAGS = {"utils.py", "misc.py", "common.py"}
"""A name that says nothing invites everything."""


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_has_files_to_check(package: Path) -> None:
    """Else a moved folder would make the rules below pass on nothing."""
    assert any(package in path.parents for path in FILES)


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert [f"{where(p)} has {n}" for p, n in lengths.items() if n > MAX_FILE_LINES] == []


def test_no_function_is_too_long() -> None:
    """Kernels are excepted: one is a single loop that cannot be cut without cost."""
    too_long = []
    for path in FILES:
        if KERNELS in path.parents:
            continue
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{where(path, node.lineno)} {node.name} has {lines}")
    assert too_long == []


def test_the_library_never_prints() -> None:
    """It logs or returns: what reaches the terminal is for the commands to decide."""
    prints = [
        where(path, node.lineno)
        for path in FILES
        if LIBRARY in path.parents
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_no_grab_bag_files() -> None:
    assert [where(path) for path in FILES if path.name in GRAB_BAGS] == []


FRAGMENT = re.compile(r"(Of|With|Without|By|As|That|Whose) ")
"""How a docstring begins that is no sentence: "Of every linear.", "By full name."."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands by itself: of modules, classes, functions and attributes."""
    for node in nodes(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_no_docstring_is_a_fragment() -> None:
    assert [f"{where(p, n)} {text}" for p in FILES for n, text in docstrings(p) if FRAGMENT.match(text)] == []


DOCUMENTED = [path for room in ("core", "numerics", "methods") for path in sorted((LIBRARY / room).rglob("*.py"))]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.ClassDef | Function]]:
    """(class or None, what it or the module defines), without names that begin with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield None, node
            methods = node.body if isinstance(node, ast.ClassDef) else ()
            yield from ((node, m) for m in methods if isinstance(m, Function) and not m.name.startswith("_"))


def test_what_is_public_in_core_numerics_and_methods_is_documented() -> None:
    """A method needs no docstring of its own where it is one that `methods/base.py` or its base class describes."""
    found = [(path, *pair) for path in DOCUMENTED for pair in public(ast.parse(path.read_text(encoding="utf-8")))]
    described = {(owner.name, node.name) for _, owner, node in found if owner and ast.get_docstring(node)}
    promised = {node.name for path, owner, node in found if path.name == "base.py" and owner}
    missing = []
    for path, owner, node in found:
        bases = [base.id for base in owner.bases if isinstance(base, ast.Name)] if owner else []
        inherited = (
            owner
            and path.name != "base.py"
            and (node.name in promised or any((base, node.name) in described for base in bases))
        )
        if not (inherited or ast.get_docstring(node)):
            missing.append(f"{where(path, node.lineno)} {node.name}")
    assert missing == []


MARKERS = {"ray", "nightly", "vllm", "gpu"}
"""Of ours, by which a test is chosen; pyproject.toml says what they mean."""
OF_PYTEST = {"parametrize", "skipif", "xfail", "filterwarnings", "usefixtures"}
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


def test_every_test_is_in_the_gate_or_marked_for_another_run() -> None:
    """Whatever its markers are, exactly one of the runs that the Makefile has takes it; `gpu` is run by hand."""
    used = {
        node.attr
        for path in TEST_FILES
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
    }
    assert used - OF_PYTEST == MARKERS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    runs = [re.search(rf"^{name} \?= (.+)$", makefile, re.M)[1] for name in ("TESTS", "NIGHTLY", "VLLM_TESTS")]
    for size in range(len(MARKERS) + 1):
        for markers in itertools.combinations(sorted(MARKERS), size):
            known = {name: name in markers for name in MARKERS}
            chosen = [run for run in (*runs, "gpu and not vllm") if eval(run, known)]
            assert len(chosen) == 1, f"a test marked {markers} is in {chosen}"


def test_no_test_is_left_out_for_a_package_that_is_missing() -> None:
    """Triton alone exists for some systems only."""
    skips = [
        (path.name, node.args[0].value)
        for path in TEST_FILES
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip"
    ]
    assert {package for _, package in skips} <= {"triton"}, skips
