"""The command line in the places where people run it: each fault in one line, with its exit code, and once."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qe_pipelines import cluster, main, terminal
from qe_pipelines.help import EXAMPLES, SHORT
from typer.main import get_command

from qe_dist.core.errors import CheckFailed, ConfigError

ROOT = Path(__file__).parents[2]
COMMANDS = get_command(main.app).commands
QE = (sys.executable, "-m", "qe_pipelines.main")


def run(*words: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`qe-dist` in a process of its own. shell: what stands behind it on the line of a shell."""
    known = {n: v for n, v in os.environ.items() if n not in ("RAY_ADDRESS", "LC_ALL", "LANG")}
    command = ["bash", "-c", f'"$@" {shell}', "bash", *QE, *words]
    environment = {n: v for n, v in {**known, **variables}.items() if v is not None}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


@pytest.fixture
def typed(monkeypatch, capsys):
    """`qe-dist` in this process: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qe-dist", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        return (end.value.code, *capsys.readouterr())

    return call


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    return lines[0]


# -- what is asked of the command line itself


def test_version(typed):
    code, out, _ = typed("--version")
    assert code == 0
    assert re.fullmatch(r"qe-dist \d+\.\d+\.\d+ \(Python .*, torch .*, transformers .*, ray .*\)\n", out)


def test_help_alone_tells_every_command_and_exit_code_and_cuts_nothing(typed):
    code, out, _ = typed("--help")
    assert code == 0
    assert "..." not in out.partition("Commands:")[2]
    for name, short in SHORT.items():
        assert f"  {name} " in out
        assert short in out
    for number in ("0 done", "1 a check", "2 an input", "70 a", "75 type", "130 interrupted"):
        assert number in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_is_whole_at_80_columns_and_has_two_examples(typed, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = typed(name, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "\u2026" not in out
    assert out.isascii()
    flat = re.sub(r"\s", "", out)
    for parameter in COMMANDS[name].params:
        assert re.sub(r"\s", "", parameter.help or "") in flat
        assert any(option in out for option in parameter.opts)
    assert out.count(f"    qe-dist {name}") >= 2


@pytest.mark.parametrize("example", [e for pair in EXAMPLES.values() for e in pair])
def test_an_example_can_be_typed(example):
    words = example.replace("\\\n", " ").split()[1:]
    context = COMMANDS[words[0]].make_context(words[0], words[1:])
    if words[0] == "submit" and context.args:
        COMMANDS[context.args[0]].make_context(context.args[0], context.args[1:])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quantise"], "Did you mean 'quantize'?"),
        (["quantize", "--recipie", "x"], "--recipe"),
        (["quantize"], "Missing argument"),
        (["quantize", "m"], "Missing option"),
        (["quantize", "m", "--seed", "one"], "--seed"),
        (["status"], "Missing argument"),
        (["--verbose"], "--version"),
    ],
)
def test_a_word_that_is_no_command_or_option_is_one_line(typed, words, says):
    code, _, err = typed(*words)
    assert code == 2
    assert says in one_line(err)
    assert "--help" in err


def test_without_any_word_help_is_shown(typed):
    code, out, err = typed()
    assert (code, err) == (2, "")
    assert "Commands:" in out


@pytest.mark.parametrize(
    ("recipe", "meant"),
    [("smothquant+gptq-w4a8", "smoothquant"), ("gtpq-w4a8", "gptq"), ("qe-papr-w4a6", "qe-paper")],
)
def test_a_recipe_that_is_close_is_suggested(recipe, meant):
    from qe_dist.methods.recipes import load_recipe

    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        load_recipe(recipe)


def test_completion_knows_the_commands():
    done = run(_QE_DIST_COMPLETE="complete_bash", COMP_WORDS="qe-dist qu", COMP_CWORD="1")
    assert done.stdout.split() == ["quantize"]


def test_commands_are_known_without_torch():
    """Else every fault takes seconds to be told."""
    code = "import qe_pipelines.main, sys; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- exit codes, and tracebacks


def failing(monkeypatch, error: BaseException):
    def fails(**_):
        raise error

    monkeypatch.setattr(main, "app", fails)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (CheckFailed("3 faults"), 1, "error: 3 faults"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/disk/x"), 75, "/disk/x: No space left on device"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (MemoryError(), 75, "no memory left"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_happens_is_one_line_and_an_exit_code(typed, monkeypatch, error, code, says, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, error)
    found, _, err = typed("status")
    assert found == code
    assert says in one_line(err)
    assert "Traceback" not in err


def test_a_fault_of_ours_keeps_its_traceback_in_a_file_that_it_names(typed, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, RuntimeError("first\nsecond"))
    _, _, err = typed("status")
    path = Path(re.search(r"its traceback is in (\S+)", one_line(err))[1])
    assert "RuntimeError: first" in path.read_text()


def test_a_fault_of_ours_where_no_file_can_be_written(typed, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    failing(monkeypatch, RuntimeError("x"))
    assert "--debug shows it" in one_line(typed("status")[2])


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(typed, place, tmp_path):
    words = ["status", str(tmp_path)]
    words.insert(place, "--debug")
    code, _, err = typed(*words)
    assert code == 2
    assert "Traceback" in err
    assert err.count("is no run") >= 1


def test_debug_behind_two_dashes_or_submit_is_not_ours():
    assert main._debugged(["serve", "x", "--", "--debug"]) == (["serve", "x", "--", "--debug"], False)
    assert main._debugged(["submit", "quantize", "--debug"]) == (["submit", "quantize", "--debug"], False)
    assert main._debugged(["--debug", "submit", "--debug"]) == (["submit", "--debug"], True)


def test_an_error_is_told_once(typed, tmp_path):
    code, out, err = typed("status", str(tmp_path / "nowhere"))
    assert (code, out) == (2, "")
    assert one_line(err).count("nowhere is no run") == 1


# -- places


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["compare", "--list"]])
def test_a_full_device(words):
    done = run(*words, shell="> /dev/full")
    assert done.returncode == 75
    assert "standard output could not be written: No space left on device" in one_line(done.stderr)


def test_a_pipe_that_nobody_reads():
    done = run("compare", "--list", shell="| true; exit ${PIPESTATUS[0]}")
    if done.returncode:  # the reader was gone before the last word
        assert done.returncode == 75
        assert "Broken pipe" in one_line(done.stderr)


def test_no_standard_output_and_a_full_standard_error():
    assert run("--version", shell=">&-").returncode == 0
    assert run("status", "/nowhere", shell="2> /dev/full").returncode == 2
    assert run("status", "/nowhere", shell="2>&-").returncode == 2


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_a_name_that_the_terminal_cannot_show(tmp_path, variables):
    done = run("status", str(tmp_path / "mod\u00e8le \u6a21\u578b"), **variables)
    assert done.returncode == 2
    assert "is no run" in one_line(done.stderr)


@pytest.mark.parametrize("home", [None, "/nowhere", "/proc/1"])
def test_without_a_home(home, tmp_path):
    done = run("status", str(tmp_path), HOME=home)
    assert done.returncode == 2
    assert "is no run" in one_line(done.stderr)


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for words in (["status"], ["verify"], ["export", "--base-only", "--output", str(tmp_path / "out")]):
        done = run(words[0], str(tmp_path / "file" / "below"), *words[1:])
        assert done.returncode == 2, done.stderr
        assert "below" in one_line(done.stderr)


# -- devices and clusters


def test_cuda_without_a_gpu_is_told_at_once(tmp_path):
    if any(any(Path("/").glob(pattern)) for pattern in cluster.GPU_FILES):
        pytest.skip("a machine with a GPU")
    words = ["quantize", "m", "--recipe", "rtn-w4a8", "--calibration", "c", "--output", str(tmp_path / "out")]
    before = time.process_time()
    for option in ("--device", "--embed-device"):
        start = os.times().children_user
        done = run(*words, option, "cuda")
        assert done.returncode == 2
        assert f"{option} cuda: this machine has no NVIDIA GPU" in one_line(done.stderr)
        assert os.times().children_user - start < 2
    assert time.process_time() - before < 2
    assert not (tmp_path / "out").exists()


def test_a_machine_with_a_gpu_may_use_it(tmp_path):
    (tmp_path / "dev").mkdir()
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        cluster.check_device("--device", "cuda", None, tmp_path)
    cluster.check_device("--device", "cpu", None, tmp_path)
    cluster.check_device("--device", "cuda", "host:6379", tmp_path)
    (tmp_path / "dev" / "nvidia0").touch()
    cluster.check_device("--device", "cuda", None, tmp_path)


def test_ray_address_is_obeyed_with_a_line(monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.joined(None) is None
    assert cluster.joined("host:1") == "host:1"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RAY_ADDRESS", "other:2")
    assert cluster.joined(None) == "other:2"
    assert "RAY_ADDRESS is set: joining the Ray cluster at other:2" in capsys.readouterr().err
    assert cluster.joined("host:1") == "host:1"
    assert capsys.readouterr().err == ""


def test_a_dead_cluster_in_ray_address_is_named_with_what_to_do():
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:1.*RAY_ADDRESS names it: unset it"):
        cluster.resources("127.0.0.1:1", None)
    with pytest.raises(ConfigError) as error:
        cluster.resources("127.0.0.1:1", "127.0.0.1:1")
    assert "RAY_ADDRESS" not in str(error.value)


def test_lines_of_a_run_end_and_the_run_goes_on_when_nobody_reads_them():
    from qe_pipelines.progress import RunView
    from rich.console import Console
    from rich.progress import Progress

    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise terminal.OutputError("closed")

        def flush(self):
            pass

    console = Console(file=Closed())
    view = RunView(console, Progress(console=console, disable=True))
    view("note", {"text": "once"})
    view("note", {"text": "twice"})
    assert view.state.notes == ("once", "twice")


def test_why_a_run_stopped_is_left_to_the_error(capsys):
    from qe_pipelines.progress import run_view

    with run_view(quiet=False) as view:
        view("note", {"text": "said"})
        view("stop", {"reason": "not said here"})
    out = capsys.readouterr().out
    assert "said" in out
    assert "not said here" not in out
