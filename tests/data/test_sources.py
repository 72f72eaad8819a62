"""The same samples from every kind of source are the same samples, and the same checkpoint."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import ReadOptions
from qe_dist.data.samples import load_images, read, read_samples
from qe_dist.data.shapes import DESCRIBE
from qe_dist.data.sources.tables import Table
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from tests.tiny import DATA, tiny_model

COUNT = 6
CAPTIONS = [f"image {i}, é" for i in range(COUNT)]


def images() -> list[bytes]:
    return [(DATA / "calibration" / f"{i:03}.png").read_bytes() for i in range(COUNT)]


def table(decoded: bool = False) -> datasets.Dataset:
    kind = datasets.Image() if decoded else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = datasets.Features({"image": kind, "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": one, "path": None} for one in images()], "caption": CAPTIONS}
    return datasets.Dataset.from_dict(rows, features=columns)


def put_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(images()):
        (folder / f"{i}.png").write_bytes(content)
    return [f"{i}.png" for i in range(COUNT)]


def openai(folder: Path) -> str:
    """JSON lines of messages, with images inside of them."""
    turns = [
        {"messages": [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(one).decode()}},
                {"type": "text", "text": DESCRIBE},
            ]},
            {"role": "assistant", "content": caption},
        ]}
        for one, caption in zip(images(), CAPTIONS, strict=True)
    ]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, turns)))
    return str(folder / "a.jsonl")


def llava(folder: Path) -> str:
    """One JSON array of conversations beside their images."""
    turns = [
        {"image": f"images/{name}", "conversations": [
            {"from": "human", "value": f"<image>\n{DESCRIBE}"}, {"from": "gpt", "value": caption},
        ]}
        for name, caption in zip(put_images(folder / "images"), CAPTIONS, strict=True)
    ]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(turns, indent=1))
    return str(folder / "a.json")


def captions(folder: Path) -> str:
    """A folder of images with captions beside."""
    for name, caption in zip(put_images(folder / "images"), CAPTIONS, strict=True):
        (folder / "images" / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return str(folder / "images")


def metadata(kind: str, folder: Path) -> str:
    """One with a table of captions, as `imagefolder` has it."""
    rows = list(zip(put_images(folder / "images"), CAPTIONS, strict=True))
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
    if kind == "csv":
        lines = ["file_name,text", *(f'{name},"{caption}"' for name, caption in rows)]
    (folder / "images" / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "images")


def parquet(folder: Path) -> str:
    """Parquet with the bytes of images, as other tools write it."""
    table().to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def parquet_of_datasets(folder: Path) -> str:
    """A folder of parquet files whose images `datasets` knows."""
    (folder / "p").mkdir()
    for i in range(2):
        table(decoded=True).select(range(3 * i, 3 * i + 3)).to_parquet(folder / "p" / f"{i}.parquet")
    return str(folder / "p")


def saved(folder: Path) -> str:
    """A data set with splits on disk."""
    datasets.DatasetDict({"train": table(decoded=True), "test": table().select([0])}).save_to_disk(folder / "d")
    return f"{folder / 'd'}#train"


SOURCES: dict[str, Callable[[Path], str]] = {
    "OpenAI": openai, "LLaVA": llava, "captions": captions, "metadata.jsonl": partial(metadata, "jsonl"),
    "metadata.csv": partial(metadata, "csv"), "parquet": parquet, "parquet of datasets": parquet_of_datasets,
    "saved": saved,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("form", SOURCES)
def test_every_source_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    name = SOURCES[form](other)
    expected, found = read(openai(plain)), read(name)
    assert found.fingerprint == expected.fingerprint
    assert [load_images(s)[0].tobytes() for s in found.samples] == [
        load_images(s)[0].tobytes() for s in expected.samples
    ]
    first = read(name, ReadOptions(limit=2)).samples
    assert [s.digest for s in first] == [s.digest for s in expected.samples[:2]]
    assert all(sample.origin.startswith(str(other)) for sample in found.samples)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_five_sources_give_the_same_checkpoint(tmp_path: Path) -> None:
    model, written = tiny_model(tmp_path / "model"), []
    for form in ("OpenAI", "LLaVA", "captions", "parquet", "saved"):
        folder = tmp_path / form
        folder.mkdir()
        quantize(
            RunConfig(model, load_recipe("gptq+qera-w4a8@0.5"), SOURCES[form](folder), folder / "out", sample_tokens=64)
        )
        written.append({path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()})
    assert "qe_manifest.json" in written[0]
    assert all(files == written[0] for files in written)


def test_faults_of_a_folder_are_named(tmp_path: Path) -> None:
    folder = Path(captions(tmp_path))
    (folder / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"1\.txt:1: byte 4 \(0xE9\) is not UTF-8"):
        read(folder)
    (folder / "1.txt").write_text(" ")
    with pytest.raises(ConfigError, match=r"1\.txt: 'caption' is empty"):
        read(folder)
    (folder / "1.txt").unlink()
    assert [note.partition(": ")[2] for note in read(folder).notes] == [
        f"images without a caption, which are left out: {folder / '1.png'}"
    ]
    (folder / "metadata.csv").write_text("file_name,text\n0.png\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv:2: has not as many cells"):
        read(folder)
    (folder / "metadata.csv").write_text("name,text\n0.png,a\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv:2: has no 'file_name'"):
        read(folder)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\ngone.png,b\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv:3: image .*gone\.png does not exist"):
        read(folder)
    for path in folder.iterdir():
        if path.suffix != ".png":
            path.unlink()
    with pytest.raises(ConfigError, match="has images and no captions"):
        read(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="has no image in it"):
        read(folder)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_faults_of_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"d#dev: the splits are test, train; say which"):
        read(saved(tmp_path).replace("#train", "#dev"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"bad\.parquet cannot be read: "):
        read(tmp_path / "bad.parquet")
    rows = {"image": [{"bytes": images()[0], "path": None}, {"bytes": b"no", "path": None}], "caption": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: row 2: image in the table is not an image"):
        read(tmp_path / "a.parquet")
    for name, says in (
        ("hf:", "must be hf:NAME"),
        ("gone.jsonl", "does not exist"),
        ("x.zip", "is no file of samples"),
    ):
        (tmp_path / "x.zip").write_bytes(b"PK")
        with pytest.raises(ConfigError, match=says):
            read(name if name != "x.zip" else tmp_path / name)


def test_a_mixture_takes_turns_by_weight_and_seed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(400)))
    mixed = f"{tmp_path / 'a.jsonl'}=3,{tmp_path / 'b.jsonl'}=1"
    found = [s.text for s in read_samples(mixed, ReadOptions(limit=200))]
    assert 130 < sum(text.startswith("a") for text in found) < 170
    assert [text for text in found if text.startswith("b")] == [f"b{i}" for i in range(200 - len(
        [text for text in found if text.startswith("a")]
    ))]  # fmt: skip
    assert [s.text for s in read_samples(mixed, ReadOptions(limit=200))] == found
    assert [s.text for s in read_samples(mixed, ReadOptions(limit=200, seed=1))] != found
    assert len(read_samples(mixed)) > 450
    with pytest.raises(ConfigError, match="every weight must be above 0"):
        read(mixed.replace("=1", "=0"))
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        read(f"{tmp_path / 'a.jsonl'}=1,gone.jsonl=1")
    shutil.copyfile(tmp_path / "a.jsonl", tmp_path / "a=1")
    assert read_samples(tmp_path / "a=1")[0].text == "a0"


def test_a_share_of_bad_samples_may_be_left_out(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"t{i}"}) for i in range(18)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join([*rows[:5], "{broken", *rows[5:], '{"image": "gone.png", "text": "x"}'])
    )
    with pytest.raises(ConfigError, match=r"a\.jsonl:6: broken JSON"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"2 of 20 samples are bad, more than 9.*a\.jsonl:6: .*:20: image"):
        read(tmp_path / "a.jsonl", ReadOptions(skip_bad=0.09))
    found = read(tmp_path / "a.jsonl", ReadOptions(skip_bad=0.1))
    assert [s.index for s in found.samples] == list(range(18))
    assert len(found.left_out) == 2
    output = tmp_path / "out"
    model = tiny_model(tmp_path / "model")
    run = RunConfig(model, load_recipe("rtn-w4a8"), tmp_path / "a.jsonl", output, reading=ReadOptions(skip_bad=0.1))
    quantize(run)
    assert len(json.loads((output / "qe_manifest.json").read_text())["left_out"]) == 2


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for one data set, whose files are in a folder without others in it."""

    folder: Path
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.partition("/resolve/")[2].partition("/")[2]
        of_data, files = path.startswith("/api/datasets/org/tiny"), sorted(self.folder.iterdir())
        if name and (self.folder / name).is_file():
            self._file(self.folder / name)
        elif of_data and "/tree/" in path and "/" not in path.partition("/tree/")[2]:
            oids = {one: one.name.encode().hex()[:40].ljust(40, "0") for one in files}
            self._send(200, [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": oids[one]} for one in files
            ])  # fmt: skip
        elif of_data and "/tree/" not in path:
            siblings = [{"rfilename": one.name} for one in files]
            self._send(200, {"id": "org/tiny", "sha": "1" * 40, "siblings": siblings, "tags": []})
        else:
            self._send(404, {}, {"X-Error-Code": "EntryNotFound" if "org/tiny" in path else "RepoNotFound"})

    def _send(self, status: int, said: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self._answer(status, json.dumps(said).encode(), {"Content-Type": "application/json", **headers})

    def _file(self, path: Path) -> None:
        content, asked = path.read_bytes(), self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        begin, end = int(asked[0]), int(asked[1] or len(content) - 1)
        about = {"ETag": f'"{path.name}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            about["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        if self.command == "GET":
            self.asked.append(path.name)
        self._answer(206 if "Range" in self.headers else 200, content[begin : end + 1], about)

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, rows in (("train", table(decoded=True)), ("test", table(decoded=True).select([0]))):
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"folder": folder, "asked": []}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.RequestHandlerClass
    server.shutdown()
    server.server_close()


READ = """
import sys
from qe_dist.data.options import ReadOptions
from qe_dist.data.samples import read
from qe_dist.core.errors import ConfigError
try:
    print(read(sys.argv[1], ReadOptions(limit=int(sys.argv[2]) or None)).fingerprint)
except ConfigError as error:
    print(error)
"""


def read_elsewhere(name: str, count: int, home: Path, **variables: str) -> str:
    """In a process of its own, since libraries read their variables when they are imported."""
    variables = {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"} | variables
    command = [sys.executable, "-c", READ, name, str(count)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.nightly
def test_a_data_set_of_the_hub_is_streamed_and_of_the_cache_read_offline(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    address, handler = hub
    expected = read(openai(tmp_path)).fingerprint
    home = tmp_path / "home"
    assert read_elsewhere("hf:org/tiny#train", 0, home, HF_ENDPOINT=address) == expected
    assert {name.partition("-")[0] for name in handler.asked} == {"train"}
    first = read(openai(tmp_path), ReadOptions(limit=2)).fingerprint
    assert read_elsewhere("hf:org/tiny#train", 2, home, HF_ENDPOINT=address) == first
    assert "the splits are test, train" in read_elsewhere("hf:org/tiny", 0, home, HF_ENDPOINT=address)
    assert "is not found" in read_elsewhere("hf:org/other#train", 0, home, HF_ENDPOINT=address)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "is not found" in read_elsewhere("hf:org/tiny#train", 0, home, **offline)
    cached = "import datasets; datasets.load_dataset('org/tiny')"
    variables = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", cached], env=variables, check=True, capture_output=True, timeout=120)
    assert read_elsewhere("hf:org/tiny#train", 0, home, **offline) == expected


def test_names_of_the_hub_have_a_revision_a_configuration_and_a_split() -> None:
    from qe_dist.data.sources.tables import HUB

    assert HUB.fullmatch("hf:org/x@main:de#test").groups() == ("org/x", "main", "de", "test")
    assert HUB.fullmatch("hf:x").groups() == ("x", None, None, None)
    assert isinstance(Table("x", Path(), lambda: None), Table)
