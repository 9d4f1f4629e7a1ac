"""Running `launch` as a user does, and looking at what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "launcher")
LIMIT = 150.0
"""Seconds after which a test gives up waiting; nothing is expected to take so long."""


@contextmanager
def launched(*arguments: object, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `launch` in `folder`, with its output in `folder/terminal.txt`. Ended on the way out."""
    with open(folder / "terminal.txt", "a") as terminal:
        job = subprocess.Popen(
            [*LAUNCH, *map(str, arguments)],
            cwd=folder,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()


def run(*arguments: object, folder: Path) -> None:
    """Run `launch` to its end, which must be a good one."""
    with launched(*arguments, folder=folder) as job:
        assert job.wait(LIMIT) == 0, (folder / "terminal.txt").read_text()


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    """Wait for something that the running job is going to do."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert job.poll() is None, "the job ended first"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def workers(job: subprocess.Popen[str]) -> list[int]:
    """The ranks' process numbers, by rank: the zygote's children, in the order of their start.

    The saver, the other child that `launch` may have, has none.
    """
    return [worker for child in _children(job.pid) for worker in _children(child)]


def steps_done(run_dir: Path, rank: int = 0) -> int:
    """What the rank reported in its progress file; 0 if nothing yet."""
    try:
        return int((run_dir / f"ranks/rank-{rank:05d}/progress").read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def losses(trace: Path) -> dict[int, float]:
    """Step -> loss as rank 0 saw it; where a step was done again after a restart, the last time."""
    return {line["step"]: line["loss"] for line in _lines(trace / "rank-00000.jsonl")}


def samples(trace: Path) -> list[int]:
    """The samples that the steps used which are part of the result, in order of step and rank."""
    taken: dict[int, list[dict[str, object]]] = {}
    for path in sorted(trace.glob("rank-*.jsonl")):
        latest = {line["step"]: line for line in _lines(path)}
        for step, line in latest.items():
            taken.setdefault(step, []).append(line)
    final_world = {step: lines[0]["world"] for step, lines in taken.items()}
    return [
        number
        for step in sorted(taken)
        for line in taken[step]
        if line["world"] == final_world[step]
        for number in line["samples"]  # type: ignore[attr-defined]
    ]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
