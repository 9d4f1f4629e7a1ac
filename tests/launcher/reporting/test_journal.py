"""The journal: whole lines whatever happens, and one vocabulary."""

from __future__ import annotations

import ast
import math
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path

import pytest

import launcher.reporting.journal
from launcher.events import (
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaveStaged,
    Tick,
)
from launcher.reporting.journal import JobJournal, Journal, read_journal
from launcher.reporting.status import Status

ROOT = Path(__file__).resolve().parents[3]


def no_complaints(text: str) -> None:
    raise AssertionError(text)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_journal(path)) == []
    journal = Journal(path, no_complaints)
    journal.record("round_started", round=1, world=8)
    journal.record("progress", step=3, loss=math.nan, rate=None, ranks=(1, 2), time=5.0)
    journal.close()
    first, second = read_journal(path)
    assert first == {"time": pytest.approx(first["time"]), "event": "round_started", "round": 1, "world": 8}
    assert second == {
        "time": 5.0,
        "event": "progress",
        "step": 3,
        "loss": "nan",
        "rate": None,
        "ranks": [1, 2],
    }
    Journal(path, no_complaints).record("job_ended", exit_code=0)
    assert [event["event"] for event in read_journal(path)] == ["round_started", "progress", "job_ended"]


@pytest.mark.parametrize("torn", [b'{"time": 1, "ev', b"\xff\xfe\n", b"17\n[]\n{}\nnull\n", b"\n\n"])
def test_a_torn_line_costs_that_line_only(tmp_path: Path, torn: bytes) -> None:
    """As a killed writer or a power failure leaves it; what comes after is not glued to it."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": 1, "event": "old"}\n' + torn)
    Journal(path, no_complaints).record("new")
    assert [event["event"] for event in read_journal(path)] == ["old", "new"]


def test_a_full_disk_is_told_of_once_and_survived(tmp_path: Path) -> None:
    """Here: a file that may not grow. What fits again is recorded again, in whole lines."""
    path = tmp_path / "events.jsonl"
    complaints: list[str] = []
    journal = Journal(path, complaints.append)
    journal.record("before")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, former[1]))
        journal.record("lost")
        journal.record("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    journal.record("after")
    assert complaints == [f"{path} cannot be written: File too large; the job goes on"]
    assert [event["event"] for event in read_journal(path)] == ["before", "after"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    complaints: list[str] = []
    journal = Journal(tmp_path / "no/events.jsonl", complaints.append)
    journal.record("lost")
    (tmp_path / "no").mkdir()
    journal.record("kept")
    journal.close()
    assert len(complaints) == 1
    assert [event["event"] for event in read_journal(tmp_path / "no/events.jsonl")] == ["kept"]


def test_progress_is_recorded_now_and_then(tmp_path: Path) -> None:
    """At most every 5 s, and at the end, if there is any."""
    journal = JobJournal(tmp_path / "events.jsonl", no_complaints)
    for time, step in (
        (100.0, None),
        (101.0, 3),
        (105.9, 7),
        (106.0, 8),
        (120.0, 8),
        (121.0, 9),
        (122.0, 10),
    ):
        journal.progress(Status("train", time, "running", 2, 99.0, step=step, rate=1.5))
    journal.progress(Status("train", 122.5, "ended", 2, 99.0, step=10), at_last=True)
    journal.progress(Status("train", 122.6, "ended", 2, 99.0, step=10), at_last=True)
    first, *others = read_journal(journal.path)
    assert {key: first[key] for key in ("event", "round", "step", "rate", "loss")} == {
        "event": "progress",
        "round": 2,
        "step": 3,
        "rate": 1.5,
        "loss": None,
    }
    assert [event["step"] for event in others] == [8, 9, 10]


def test_what_becomes_of_a_save_is_recorded(tmp_path: Path) -> None:
    """By the saver, or by workers without it; not each try that fails."""
    journal = JobJournal(tmp_path / "events.jsonl", no_complaints)
    for event in (
        SaveStaged(7),
        SavePersisting(7, "local", 1, 2),
        SavePersisted(7, "local", "/x", 1.5),
        SaveFailed(7, "remote", "s3://b", "no bucket"),
        SaveFailed(7, "remote", "s3://b", "no bucket", again=True),
        SavedByWorkers(8, "remote"),
        Tick(),
    ):
        journal.on_save(event)
    assert [{**event, "time": 0} for event in read_journal(journal.path)] == [
        {"time": 0, "event": "staged", "step": 7},
        {"time": 0, "event": "persisted", "step": 7, "tier": "local", "url": "/x", "seconds": 1.5},
        {
            "time": 0,
            "event": "save_failed",
            "step": 7,
            "tier": "remote",
            "url": "s3://b",
            "error": "no bucket",
        },
        {"time": 0, "event": "persisted", "step": 8, "tier": "remote"},
    ]


def _write_many(path: Path, name: str) -> None:
    journal = Journal(path, no_complaints)
    for number in range(500):
        journal.record(name, number=number, text="x" * (number % 300))
    os._exit(0)


def test_several_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, name)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = list(read_journal(path))
    assert len(path.read_bytes().splitlines()) == 1500
    for name in ("a", "b", "c"):
        assert [event["number"] for event in events if event["event"] == name] == list(range(500))


def _told_in_docstring() -> set[str]:
    table = (launcher.reporting.journal.__doc__ or "").partition("fields\n")[2]
    return {line.split()[0] for line in table.splitlines() if line}


def test_one_vocabulary() -> None:
    """What the launcher records, what the module says, and what the documentation says are the same events."""
    recorded = {
        node.args[0].value
        for path in (ROOT / "launcher").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "record"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    section = (ROOT / "docs/events.md").read_text().partition("## Asking")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert documented == _told_in_docstring()
    assert recorded <= documented
