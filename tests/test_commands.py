"""Every command in the documents can be typed: it exists, has these options, and names files that exist or stand for
the reader's own. Those that take seconds are run."""

import re
import shlex
from pathlib import Path

import pytest
from qe_pipelines import main
from typer.main import get_command

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.journal import JOURNAL, Journal
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*/*.md")} - {*ROOT.glob("docs/reference/*.md")})
"""The reference is made from the commands themselves."""
PROGRAM = re.compile(r"^(?:    )?(?:\.venv/bin/)?((?:qe-dist|make|python) .*)$")
COMMAND_LINE = get_command(main.app)
OWN = {"calibration.jsonl", "development.jsonl", "mine.toml", "questions.jsonl", "samples.jsonl", "test.jsonl"}
"""Names that stand for the reader's own files, besides words in capitals."""
ELSEWHERE = ("/shared/", "s3://", "http://", "real/")
"""On a cluster, in a bucket, or made by `make real`."""
FILE = re.compile(r".*/.*|.*\.(py|jsonl|toml|md|yaml|json)")


def blocks(text: str) -> list[str]:
    """The lines of code of a page: indented, or in a fence that is not Python."""
    fenced = [line for code in re.findall(r"```(?!python)\w*\n(.*?)```", text, re.DOTALL) for line in code.splitlines()]
    return [*fenced, *(line for line in text.splitlines() if line.startswith("    "))]


def commands(page: Path) -> list[str]:
    """Each on one line, without the comment behind it."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in blocks(text) if PROGRAM.match(line)]
    parts = [part for line in lines for part in re.split(r"\s#\s", line)[0].split(" && ")]
    return [" ".join(match[1].split()) for part in parts if (match := PROGRAM.match(part))]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands(page)})
OURS = [(page, command) for page, command in COMMANDS if command.startswith("qe-dist ")]
MADE = [(page, command) for page, command in COMMANDS if command.startswith("make ")]
SCRIPTS = [(page, command) for page, command in COMMANDS if command.startswith("python ")]


def test_there_are_commands_to_look_at() -> None:
    """Else a change of how pages show code would make the tests below pass on nothing."""
    assert len(OURS) > 20
    assert MADE
    assert SCRIPTS


def parse(words: list[str]) -> None:
    """Fails where there is no such command or option, a value is of another type, or one that is needed is missing."""
    command = COMMAND_LINE.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if words[0] == "submit" and context.args:
        parse(context.args)


@pytest.mark.parametrize(("page", "command"), OURS)
def test_a_command_of_ours_can_be_typed(page: str, command: str) -> None:
    parse(shlex.split(command)[1:])


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises(KeyError):
        parse(["quantise", "MODEL"])
    with pytest.raises(Exception, match="--recipes"):
        parse(["quantize", "MODEL", "--recipes", "a", "--calibration", "b", "--output", "c"])


@pytest.mark.parametrize(("page", "command"), MADE)
def test_make_has_the_targets_and_the_variables(page: str, command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in shlex.split(command)[1:]:
        name, is_variable, _ = word.partition("=")
        wanted = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(wanted, makefile, re.MULTILINE), f"{page}: make has no {word}"


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_files_exist_or_are_the_readers_own(page: str, command: str) -> None:
    words = [part for word in shlex.split(command.partition("#")[0])[1:] for part in word.split(",")]
    named = [word for word in words if FILE.fullmatch(word) and "=" not in word]
    unknown = [
        word
        for word in named
        if not (word in OWN or word.startswith(ELSEWHERE) or word.isupper() or (ROOT / word).exists())
    ]
    assert unknown == [], page


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the reader's own: a tiny model, its checkpoint after a run, and samples."""
    root = tmp_path_factory.mktemp("commands")
    run = RunConfig(
        tiny_model(root / "model"),
        load_recipe("gptq-w4a8"),
        calibration(root / "data"),
        root / "out",
        sample_tokens=64,
    )
    local.quantize(run)
    Journal(RunDir(run.output).root / JOURNAL)(
        "start", {"batches": 1, "blocks": 2, "done": 2, "first": 2, "workers": 1}
    )
    names = {"MODEL": run.model, "DIR": run.output, "CHECKPOINT": run.output, "OUT": run.output}
    return {name: str(path) for name, path in (names | dict.fromkeys(OWN, run.calibration)).items()}


QUICK = [command for _, command in OURS if command.split()[1] in ("verify", "status", "eval") or "--list" in command]
QUICK = [command for command in dict.fromkeys(QUICK) if "--tensor-parallel-size" not in command]
"""That of tensor parallelism is run by tests/pipelines/test_preflight.py."""


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(
    command: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [places.get(word, word) for word in shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0
    assert capsys.readouterr().out
