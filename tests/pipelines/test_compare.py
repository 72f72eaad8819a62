"""`qe-dist compare`: the checkpoints and the numbers that each recipe gives alone, and who wins."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qe_cluster import launch
from qe_pipelines import main
from qe_pipelines.entries import (
    HEADER,
    PAIRED,
    Entry,
    by_arithmetic,
    cells,
    control_of,
    front,
    is_control,
    paired,
    scheme_of,
    table_of,
)
from qe_pipelines.measuring import GIB, finished

from qe_dist import methods
from qe_dist.checkpoint.quality import Quality, SampleScore
from qe_dist.core.errors import ConfigError
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import METHODS, SCHEMES, load_recipe
from tests.tiny import calibration, tiny_model

MINE = """
scheme = "w4a6"
[transform]
name = "smoothquant"
[compensation]
name = "qera"
[budget]
extra_bits = 0.5
factor_bits = 8
"""
RECIPES = ("hadamard+awq-w4a6", "rtn-w4a16g32", "mine")
"""Of two rotations, two number formats, and one from a file."""
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    (root / "mine.toml").write_text(MINE)
    data = calibration(root / "data", 4)
    measured = data.with_name("measured.jsonl")
    measured.write_text("\n".join(data.read_text().splitlines()[1:]) + "\n")
    return {"model": tiny_model(root / "model"), "data": data, "measured": measured, "mine": root / "mine.toml"}


def run(*words: object) -> None:
    """`qe-dist` with these words, in this process; an exit with an error is raised on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["qe-dist", *map(str, words)])
        try:
            main.main()
        except SystemExit as end:
            if end.code:
                raise


def words_of(given: dict[str, Path], output: Path, **other: object) -> list[object]:
    recipes = ",".join(str(given["mine"]) if name == "mine" else name for name in RECIPES)
    options = {"recipes": recipes, "calibration": given["data"], "data": given["measured"], "output": output} | other
    options = {name: value for name, value in options.items() if value is not None}
    return ["compare", given["model"], *(w for name, value in options.items() for w in (f"--{name}", value))]


# -- a comparison of a small model


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with launch.ray_cluster(None, 2):
        yield


@pytest.fixture(scope="module")
def compared(cluster: None, given_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compared") / "out"
    run(*words_of(given_files, output, workers=2))
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def entries_of(output: Path) -> dict[str, dict[str, Any]]:
    return {entry["recipe"]: entry for entry in json.loads((output / "compare.json").read_text())["entries"]}


@pytest.mark.ray
def test_every_recipe_has_a_checkpoint_a_row_and_every_format_a_plot(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    assert found["environment"]["versions"]
    assert [entry["recipe"] for entry in found["entries"]] == list(RECIPES)
    assert [entry["scheme"] for entry in found["entries"]] == ["w4a6", "w4a16", "w4a6"]
    assert sorted(p.name for p in compared.iterdir()) == sorted(
        [*RECIPES, "compare.json", "w4a16-a16.png", "w4a6-int8.png"]
    )
    for plot in compared.glob("*.png"):
        assert plot.read_bytes().startswith(PNG)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_is_that_of_quantize_alone(
    compared: Path, given_files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    recipe = given_files["mine"] if name == "mine" else name
    words = ["--recipe", recipe, "--calibration", given_files["data"], "--output", tmp_path / "alone", "--workers", 1]
    run("quantize", given_files["model"], *words)
    assert files(compared / name) == files(tmp_path / "alone")


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize("name", RECIPES)
def test_an_entry_says_what_eval_and_the_manifest_say(
    compared: Path, given_files: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    entry, manifest = entries_of(compared)[name], read_manifest(compared / name)
    capsys.readouterr()
    run("eval", compared / name, "--data", given_files["measured"], "--reference", given_files["model"], "--json")
    quality = json.loads(capsys.readouterr().out)
    for measure in ("accuracy", "perplexity", "kl", "agreement"):
        assert entry[measure] == pytest.approx(quality[measure], rel=1e-5)
    assert entry["kinds"].keys() == quality["kinds"].keys()
    assert entry["kl"] > 0
    assert entry["bits"] == manifest.bits_per_weight
    assert entry["active_bits"] == manifest.active_bits_per_weight
    assert entry["macs"] == manifest.macs_per_weight
    assert entry["fallbacks"] == len(manifest.fallbacks)
    assert entry["fit_seconds"] > 0


@pytest.mark.ray
@pytest.mark.nightly
def test_a_second_call_fits_only_what_is_new(
    compared: Path, given_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (compared / name).glob("*.safetensors")}

    before, old = entries_of(compared), {name: written(name) for name in RECIPES}
    given = [str(given_files["mine"]) if name == "mine" else name for name in ("rtn-w4a6", *RECIPES)]
    capsys.readouterr()
    run(*words_of(given_files, compared, recipes=",".join(given), workers=2))
    after, lines = entries_of(compared), capsys.readouterr().out.splitlines()
    assert list(after) == ["rtn-w4a6", *RECIPES]
    assert {name: after[name] for name in RECIPES} == before
    assert {name: written(name) for name in RECIPES} == old
    for name, entry in after.items():  # a pipe is no reason to fold a row
        rows = [line for line in lines if re.match(rf"\W*{re.escape(name)} ", line)]
        assert rows
        assert len(rows) == 1 or entry["control"]  # which stand below every table
        for row in rows:
            assert f"{entry['bits']:.2f}" in row
            assert f"{entry['kl']:.5f}" in row


# -- what is refused


@pytest.fixture
def refused(
    given_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """What is said about these options: one paragraph, before Ray starts and anything is written."""

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was started")

    def call(**options: object) -> str:
        output = options.setdefault("output", tmp_path / "out")
        monkeypatch.setattr(launch, "ray_cluster", no_ray)
        monkeypatch.setattr("sys.argv", ["qe-dist", *map(str, words_of(given_files, **options))])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 2
        assert output is None or not output.exists()
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert len(message.splitlines()) == 1
        return message

    return call


@pytest.mark.parametrize("name", ["recipes", "calibration", "data", "output"])
def test_a_missing_option_is_named(refused: Callable[..., str], name: str) -> None:
    assert f"compare needs --{name} (or --list alone)" in refused(**{name: None})


def test_no_recipe_but_commas(refused: Callable[..., str]) -> None:
    assert "compare needs --recipes" in refused(recipes=" ,, ")


def test_nothing_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["qe-dist", "compare"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "needs MODEL, --recipes, --calibration, --data, --output (or --list alone)" in capsys.readouterr().err


def test_an_unknown_recipe(refused: Callable[..., str]) -> None:
    assert "there is no recipe 'magic-w4a6'" in refused(recipes="rtn-w4a6,magic-w4a6")


def test_two_recipes_of_one_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    """Of different rotations too, which are fitted in a pass each."""
    (tmp_path / "rtn-w4a6.toml").write_text('scheme = "w4a6"\n[rotation]\nname = "hadamard"')
    message = refused(recipes=f"rtn-w4a6,{tmp_path / 'rtn-w4a6.toml'}")
    assert "would share the folder rtn-w4a6" in message


def test_bad_samples_to_measure_with(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "The sun is warm."}\n{"text": \n')
    assert "bad.jsonl:2: broken JSON" in refused(data=tmp_path / "bad.jsonl")
    assert "none.jsonl does not exist" in refused(data=tmp_path / "none.jsonl")


# -- what there is


def test_list_prints_every_member_whole(capsys: pytest.CaptureFixture[str]) -> None:
    run("compare", "--list")
    cut = [line.replace("│", "|").split("|") for line in capsys.readouterr().out.splitlines()]
    rows = {line[1].strip(): set(line[2].strip().split(", ")) for line in cut if len(line) == 4}
    wanted = {axis: set(methods.names(axis)) for axis in methods.FOLDERS}
    assert rows == {"whole recipes": set(METHODS), **wanted, "number formats": set(SCHEMES)}
    executed = [[cell.strip() for cell in line[1:-1]] for line in cut if len(line) == 3 + len(SCHEMES)]
    told = {name: dict(zip(SCHEMES, row, strict=True)) for names, *row in executed for name in names.split(", ")}
    assert told == {
        name: {s: load_recipe(f"{name}-{s}").scheme.arithmetic for s in SCHEMES} for name in METHODS
    }  # fmt: skip


# -- who wins

SIZES = ("bits", "active_bits", "macs")


def entry(recipe: str, bits: float, active_bits: float, macs: float, kl: float, **other: Any) -> Entry:
    rest = {"scheme": "w4a6", "accuracy": None, "perplexity": None, "kinds": {}, "fit_seconds": 1.0, "fallbacks": 0}
    return Entry(recipe=recipe, bits=bits, active_bits=active_bits, macs=macs, kl=kl, **(rest | other))


FEW = st.sampled_from([1.0, 2.0, 3.0, 4.0])
"""So that there are ties."""
ENTRIES = st.lists(st.tuples(FEW, FEW, FEW, FEW), max_size=8).map(
    lambda rows: [entry(f"recipe {i}", *row) for i, row in enumerate(rows)]
)


def beats(a: Entry, b: Entry, size: str) -> bool:
    mine, yours = (getattr(a, size), a.kl), (getattr(b, size), b.kl)
    return mine != yours and mine[0] <= yours[0] and mine[1] <= yours[1]


@given(entries=ENTRIES, size=st.sampled_from(SIZES))
def test_in_front_is_whom_nobody_beats(entries: list[Entry], size: str) -> None:
    wanted = [e for e in entries if not any(beats(other, e, size) for other in entries)]
    found = front(entries, size)
    assert sorted(e.recipe for e in found) == sorted(e.recipe for e in wanted)
    assert [getattr(e, size) for e in found] == sorted(getattr(e, size) for e in found)


def test_a_row_says_at_what_a_recipe_wins() -> None:
    small = entry("small", 4.0, 4.5, 1.2, 0.5)
    good = entry("good", 5.0, 5.0, 1.0, 0.1, accuracy=0.5, perplexity=2.0)
    beaten = entry("beaten", 5.5, 5.0, 1.1, 0.2)
    rows = {e.recipe: dict(zip(HEADER, cells(e, [small, good, beaten]), strict=True)) for e in (small, good, beaten)}
    assert [rows[name]["wins at"] for name in ("small", "good", "beaten")] == [
        "bytes, active bytes",
        "bytes, active bytes, multiplications",
        "",
    ]
    assert rows["good"]["accuracy"] == "50.0%"
    assert (rows["small"]["accuracy"], rows["small"]["perplexity"]) == ("", "")
    assert [row.style for row in table_of("w4a6", [small, good, beaten], [small, good, beaten]).rows] == [
        "bold",
        "bold",
        None,
    ]


@pytest.mark.parametrize(("written", "scheme"), [("w4a6k64", "w4a6"), ("w3a16g128", "w3a16"), ("w4a16", "w4a16")])
def test_formats_are_compared_by_their_bits(written: str, scheme: str) -> None:
    assert scheme_of(written) == scheme


# -- against which control


def scored(recipe: str, bits: float, level: float, **other: Any) -> Entry:
    """With samples whose KL is about `level` for every token."""
    scores = [
        SampleScore(i, "text", "text", 20 + i, False, 40.0, level * (20 + i) * (1 + 0.02 * (i % 5)), 9)
        for i in range(30)
    ]
    found = Quality(scores)
    told = {"scores": found.columns(), "intervals": found.summary()["intervals"], "agreement": 0.5} | other
    return entry(recipe, bits, bits, 1.0, found.summary()["kl"], **told)


def test_tables_are_of_one_arithmetic_and_show_every_control_below() -> None:
    control = scored("gptq-w4a16g64", 4.25, 0.18, scheme="w4a16", arithmetic="a16", control=True)
    small = scored("gptq-w4a8", 4.02, 0.3, scheme="w4a8", arithmetic="int8", control=True)
    mine = scored("qe-w4a8", 4.27, 0.15, scheme="w4a8", arithmetic="int8")
    hidden = scored("gptq-w4a8k64", 4.02, 0.2, scheme="w4a8", arithmetic="a16")
    entries = [small, mine, control, hidden]
    tables = dict(by_arithmetic(entries))
    assert {title: [e.recipe for e in own] for title, own in tables.items()} == {
        "w4a16-a16": ["gptq-w4a16g64"],
        "w4a8-a16": ["gptq-w4a8k64"],
        "w4a8-int8": ["qe-w4a8", "gptq-w4a8"],
    }
    shown = table_of("w4a8-int8", tables["w4a8-int8"], entries)
    assert list(shown.columns[0].cells) == ["qe-w4a8", "gptq-w4a8", "gptq-w4a16g64"]
    # the best control that is not larger, with an interval that is off zero
    assert control_of(mine, entries) is control
    assert control_of(hidden, entries) is small
    assert control_of(small, entries) is None
    row = dict(zip(PAIRED, paired(mine, entries), strict=True))
    assert row["control"] == "gptq-w4a16g64"
    gap, low, high = (float(word.strip("[],")) for word in row["KL less that of the control, 95 %"].split())
    assert low <= gap <= high < 0


@pytest.mark.parametrize(
    ("recipe", "control"),
    [("gptq-w4a16g64", True), ("qe-w4a16", True), ("gptq-w4a8", True), ("gptq-w4a8g64", True), ("gptq-w4a8k64", False),
     ("gptq-w4a6", False), ("rtn-w4a8", False), ("qe-w4a8", False), ("gptq-w3a16", False)],
)  # fmt: skip
def test_controls_are_weights_alone_in_four_bits_and_plain_gptq_at_w4a8(recipe: str, control: bool) -> None:
    assert is_control(load_recipe(recipe).describe()) is control


def test_a_task_that_no_node_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"memory": 2.0 * GIB}}])
    with pytest.raises(ConfigError, match=r"to evaluate big takes a process of 3.0 GiB.*2.0 GiB"):
        finished([(print, (), Path("big"), 3 * GIB)], "cpu")
