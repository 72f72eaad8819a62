"""The journal: every record that was written whole is read, whatever happened to its neighbours."""

import json
import resource
import signal

import pytest

from qe_dist.io import journal as module
from qe_dist.io.journal import Journal, read_journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def events(path):
    return [(record.event, record.data) for record in read_journal(path)[0]]


def test_what_is_written_is_read_in_its_order(path):
    journal = Journal(path)
    journal("start", {"blocks": 2})
    journal("stop", {"reason": "a line\nbreak"})
    assert events(path) == [("start", {"blocks": 2}), ("stop", {"reason": "a line\nbreak"})]


def test_every_call_of_the_command_has_its_id_in_one_file(path):
    Journal(path)("start", {})
    second = Journal(path)
    second("start", {})
    second("done", {})
    one, two, three = (record.call for record in read_journal(path)[0])
    assert one != two
    assert two == three


def test_elapsed_goes_on_when_the_wall_clock_jumps_back(path, monkeypatch):
    times = iter(["2026-11-21T12:00:00+00:00", "2026-11-21T09:00:00+00:00"])
    clock = iter([100.0, 101.5, 103.0])
    monkeypatch.setattr(module, "now", lambda: next(times))
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    journal = Journal(path)
    journal("batch", {})
    journal("batch", {})
    first, second = read_journal(path)[0]
    assert (first.elapsed, second.elapsed) == (1.5, 3.0)
    assert second.time < first.time


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_line_torn_by_a_kill_is_skipped_and_the_next_writer_begins_a_new_one(path, kept):
    Journal(path)("start", {})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    assert events(path) == [("start", {})]
    Journal(path)("done", {})
    # A line that lost no more than its end is whole again.
    assert [event for event, _ in events(path)] == ["start", *(["start"] if kept == -1 else []), "done"]


def test_a_line_of_zeros_as_a_lost_page_leaves_it_is_skipped(path):
    path.write_bytes(bytes(4096))
    Journal(path)("start", {})
    assert events(path) == [("start", {})]


def test_a_reader_goes_on_where_it_stopped_and_waits_for_the_end_of_a_line(path):
    journal = Journal(path)
    journal("start", {})
    first, there = read_journal(path)
    journal("done", {})
    text = path.read_bytes()
    path.write_bytes(text[:-5])
    assert read_journal(path, there) == ([], there)
    path.write_bytes(text)
    rest, end = read_journal(path, there)
    assert [r.event for r in first + rest] == ["start", "done"]
    assert end == len(text)


def test_what_the_block_s_own_file_has_is_not_repeated(path):
    Journal(path)("block", {"index": 3, "layout": {"long": 1}, "tensors": {"long": 1}})
    assert events(path) == [("block", {"index": 3})]


def test_of_many_workers_one_a_second_is_written(path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    journal = Journal(path)
    for second in range(100):
        clock[0] = float(second)
        for worker in range(8):
            journal("worker", {"worker": worker})
    written = [record.data["worker"] for record in read_journal(path)[0]]
    assert 90 <= len(written) <= 110
    assert all(written.count(worker) >= 12 for worker in range(8))


@pytest.fixture
def full_disk():
    """Calls `full_disk(size)`: no file of this process may grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_the_run_goes_on_it_is_said_once_and_the_journal_goes_on_with_space(path, full_disk):
    notes = []
    journal = Journal(path, lambda event, data: notes.append((event, data["text"])))
    journal("start", {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    full_disk(path.stat().st_size + 10)
    journal("batch", {"index": 0})
    journal("batch", {"index": 1})
    full_disk(limit)
    journal("done", {})
    assert not path.read_bytes().startswith(b"\n")
    assert b'{"call": "' in path.read_bytes().split(b"\n")[1]  # some bytes of a batch, and then the end of its line
    assert [event for event, _ in events(path)] == ["start", "done"]
    ((event, text),) = notes
    assert event == "note"
    assert f"{path} cannot be written (File too large); the run goes on" in text


def test_a_folder_that_is_gone_does_no_harm_either(tmp_path):
    notes = []
    Journal(tmp_path / "gone" / "journal.jsonl", lambda event, data: notes.append(event))("start", {})
    assert notes == ["note"]


def test_a_record_is_a_line_of_json_for_every_tool(path):
    Journal(path)("lost", {"worker": 1, "node": "b"})
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["event"] == "lost"
    assert record["data"] == {"worker": 1, "node": "b"}
    assert set(record) == {"call", "time", "elapsed", "event", "data"}
