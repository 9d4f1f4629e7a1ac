"""Drain requests: written by `launch` into a node's drain file, read by shardckpt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from shardckpt.drain import DrainFile, Reason, Request, Scope
from tests.kit.contract import section, table


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    found = RunDir(tmp_path / "run", tmp_path / "run/logs")
    yield found
    found.close()


@pytest.mark.parametrize(
    ("reason", "tiers", "scope"),
    [("preemption", "durable", Scope.DURABLE), ("restart", "memory", Scope.MEMORY)],
)
def test_requests(run_dir: RunDir, reason: Reason, tiers: str, scope: Scope) -> None:
    """A worker that has opened the file sees the request; the next round starts without one."""
    file = DrainFile(str(run_dir.drain))
    assert file.read() is None
    run_dir.request_drain(reason, tiers)
    assert file.read() == Request(scope, reason)
    assert reason in table("Drains")["reason"]
    assert tiers in table("Drains")["tiers"]
    run_dir.begin_round(1, [0])
    assert file.read() is None
    file.close()


def test_the_file_is_empty_when_workers_start(run_dir: RunDir) -> None:
    """Also after a `launch` that has left a request behind."""
    run_dir.request_drain("preemption", "durable")
    run_dir.close()
    RunDir(run_dir.path, run_dir.logs).close()
    assert run_dir.drain.read_bytes() == b""


def test_the_documents_example_is_a_request(run_dir: RunDir) -> None:
    (line,) = (line.strip() for line in section("Drains").splitlines() if line.startswith("    {"))
    run_dir.drain.write_text(f"{line}\n")
    file = DrainFile(str(run_dir.drain))
    assert file.read() == Request(Scope.DURABLE, "preemption")
    file.close()


@pytest.mark.parametrize("line", ['{"reason": "preemption", "tiers": "durable"}', '{"reason": "pre', "\n"])
def test_a_line_without_its_end_is_no_request(run_dir: RunDir, line: str) -> None:
    run_dir.drain.write_text(line.removesuffix("\n") or "")
    file = DrainFile(str(run_dir.drain))
    assert file.read() is None
    file.close()


@pytest.mark.parametrize("line", ["later", "{}", '{"reason": "fun", "tiers": "durable"}'])
def test_a_line_that_is_not_understood_is_logged_once(
    run_dir: RunDir, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir.drain.write_text(f"{line}\n")
    file = DrainFile(str(run_dir.drain))
    with caplog.at_level(logging.ERROR):
        assert file.read() is file.read() is None
    assert len(caplog.records) == 1
    file.close()


def test_the_file_is_not_replaced(run_dir: RunDir) -> None:
    """Workers keep it open."""
    before = run_dir.drain.stat().st_ino
    run_dir.request_drain("restart", "memory")
    run_dir.begin_round(1, [0])
    assert run_dir.drain.stat().st_ino == before
