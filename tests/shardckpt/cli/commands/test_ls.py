"""`shardckpt ls`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST
from tests.shardckpt.cli.helpers import Call, change


def test_lists_a_run_newest_last(call: Call, run: Path) -> None:
    """One aligned line for each, without decoration where it is piped; the newest good one is marked."""
    code, out, err = call("ls", run)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["ATTEMPT", "STEP", "AGE", "RANKS", "SIZE", "STATE", "METRICS"]
    rows = [line.replace("*", " ").split() for line in lines[1:]]
    assert [(row[0], row[1]) for row in rows] == [("1", "50"), ("1", "100"), ("2", "150"), ("2", "200")]
    assert [line.startswith("*") for line in lines[1:]] == [False, False, True, False]
    assert rows[2][-2:] == ["loss", "0.00666667"]
    assert rows[3][-1] == "unfinished"


def test_json(call: Call, run: Path) -> None:
    code, out, _ = call("ls", run, "--json")
    rows = json.loads(out)["checkpoints"]
    assert code == 0
    assert [(row["step"], row["state"], row["newest"]) for row in rows] == [
        (50, "good", False),
        (100, "good", False),
        (150, "good", True),
        (200, "unfinished", False),
    ]
    assert rows[2]["url"] == str(run / "attempt-0002/step-00000150")
    assert rows[2]["bytes"] == (run / "attempt-0002/step-00000150/rank-00000/data.pack").stat().st_size
    assert rows[2]["metrics"] == {"loss": 1 / 150}
    assert rows[3]["created"] is None


def test_what_is_wrong_with_each(call: Call, run: Path, newest: Path) -> None:
    """A checkpoint that was marked bad, cannot be read, is of another version, or whose save failed."""
    (newest / "bad.json").write_bytes(records.encode({"error": f"{newest}: the chunk of 'x' is corrupt"}))
    (run / "attempt-0001/step-00000100" / MANIFEST).write_text("{")
    change(run / "attempt-0001/step-00000050" / MANIFEST, lambda m: m.update(format="shardckpt/99"))
    failed = run / "attempt-0002/step-00000200/failed.json"
    failed.write_bytes(records.encode({"id": "x", "error": "StorageFullError: no\x1b[31m space"}))
    code, out, _ = call("ls", run, "--json")
    rows = json.loads(out)["checkpoints"]
    assert [row["state"] for row in rows] == ["other version", "invalid", "bad", "failed"]
    assert rows[2]["note"] == "the chunk of 'x' is corrupt"
    assert not any(row["newest"] for row in rows)
    code, out, _ = call("ls", run)
    assert code == 0
    assert "\x1b" not in out
    assert "no\\x1b[31m space" in out


def test_one_checkpoint(call: Call, newest: Path, tmp_path: Path) -> None:
    """In a run, and on its own."""
    assert json.loads(call("ls", newest, "--json")[1])["checkpoints"][0]["step"] == 150
    shutil.copytree(newest, tmp_path / "alone")
    _, out, _ = call("ls", tmp_path / "alone")
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("there", ["nothing", "a folder", "another folder", "a file", "a job"])
def test_not_a_run(call: Call, tmp_path: Path, there: str) -> None:
    url = tmp_path / "x"
    if there in ("a folder", "another folder"):
        url.mkdir()
    if there == "another folder":
        (url / "file").touch()
    if there == "a file":
        url.touch()
    if there == "a job":
        (url / "attempt-0001").mkdir(parents=True)
        (url / "attempt-0001/attempt.json").touch()
    code, out, err = call("ls", url)
    kind = "it is a file of 0 bytes, of no kind that is known here"
    kinds = {"another folder": "it has file, but no manifest.json", "a file": kind}
    found = f"{kinds.get(there, 'nothing is there')}. Check the URL."
    if there == "a job":
        found = "jobs have begun there, and none of them has saved a checkpoint yet."
    assert (code, out) == (3, "")
    assert err == f"shardckpt: {url} is neither a run with checkpoints nor a checkpoint: {found}\n"
