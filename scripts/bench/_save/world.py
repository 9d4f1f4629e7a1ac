"""Starts a world of ranks for scripts/bench/save, and watches its memory from outside."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _kit.processes import MARK, kill_marked, marked

from launcher.zygote.orders import LARGE_COPIES

__all__ = ["Job", "Results", "run_world"]

Job = tuple[int, str]
Results = dict[Job, dict[str, float | str]]
"""By round and candidate: seconds and bytes by name, or the reason of a failure as "error"."""

_RANK = Path(__file__).parents[1] / "_save_rank.py"
_SILENCE = 240.0
_FAREWELL = 10.0
_LOG_LINES = 40
_TICK = 0.02
_RESCAN = 0.1


class Sampler:
    """The peak of the memory of all processes that have a mark in their environment, by which it finds them.

    Those that a candidate starts are among them. Every page counts once, by its proportional share (PSS) in each
    process that has it mapped: private memory, and shared memory such as memfds, but not the page cache.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._pids: list[int] = []
        self._scanned = 0.0
        self._base = self._peak = (0, 0)
        self.active = False

    def begin(self) -> None:
        self._base = self._peak = self._now()
        self.active = True

    def sample(self) -> None:
        total, private = self._now()
        self._peak = (max(self._peak[0], total), max(self._peak[1], private))

    def end(self) -> tuple[int, int]:
        """Bytes above what there was when it began: in all, and of private memory; each at its own peak."""
        self.active = False
        return self._peak[0] - self._base[0], self._peak[1] - self._base[1]

    def _now(self) -> tuple[int, int]:
        if time.monotonic() - self._scanned > _RESCAN:
            self._pids, self._scanned = marked(self._mark), time.monotonic()
        private = shared = 0
        for pid in self._pids:
            fields = _fields(f"/proc/{pid}/smaps_rollup")
            private += fields.get("Pss_Anon:", 0)
            shared += fields.get("Pss_Shmem:", 0)
        return private + shared, private


def run_world(
    ranks: int, threads: int, jobs: Sequence[Job], settings: dict[str, Any], facts: dict[str, Any]
) -> Results:
    """Do the jobs on so many ranks.

    A candidate that fails, or hangs, is left out from then on, and the world is started again for the
    rest. `facts` receives what the ranks tell of the state.
    """
    results: Results = {}
    left = list(jobs)
    while left:
        reports = _one_world(ranks, threads, left, settings)
        current: Job | None = None
        for event in reports:
            if event["event"] == "ready":
                facts |= {key: event[key] for key in ("stored", "tensors")}
            elif event["event"] == "begin":
                current = (event["round"], event["candidate"])
                print(f"{ranks} ranks, round {current[0]}: {current[1]}", file=sys.stderr)
            elif event["event"] == "memory":
                total, private = event["bytes"]
                of = results.setdefault(current or left[0], {})
                of |= {f"{event['what']}_memory": total, f"{event['what']}_private_memory": private}
            elif event["event"] == "end" and current is not None:
                results.setdefault(current, {}).update(event["results"])
                left.remove(current)
                current = None
            else:
                current = current or left[0]
                results.setdefault(current, {})["error"] = event["error"]
                print(f"{current[1]} failed: {event['error']}", file=sys.stderr)
                left = [job for job in left if job[1] != current[1]]
    return results


def _one_world(
    ranks: int, threads: int, jobs: list[Job], settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Start the ranks, and yield what they report. Nothing of them is left when it ends."""
    mark = secrets.token_hex(8)
    store, log = (Path(settings["folder"], f"{name}-{mark}") for name in ("store", "log"))
    reader, writer = os.pipe()
    environment = {
        "GLIBC_TUNABLES": LARGE_COPIES,  # as `launch` does
        **os.environ,
        MARK: mark,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1",  # DCP's background processes meet there
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    processes = []
    with log.open("wb") as output:
        for rank in range(ranks):
            world = {**settings, "rank": rank, "ranks": ranks, "store": str(store), "jobs": jobs}
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(_RANK), json.dumps({**world, "report": writer})],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=[writer] if rank == 0 else [],
                    stdout=output,
                    stderr=output,
                )
            )
    os.close(writer)
    sampler = Sampler(mark)
    try:
        for event in _events(reader, sampler):
            if event["event"] == "failed":
                print("\n".join(log.read_text().splitlines()[-_LOG_LINES:]), file=sys.stderr)
            yield event
        deadline = time.monotonic() + _FAREWELL
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(_TICK)
    finally:
        os.close(reader)
        kill_marked(mark)
        for process in processes:
            process.wait()
        store.unlink(missing_ok=True)
        log.unlink()


def _events(reader: int, sampler: Sampler) -> Iterator[dict[str, Any]]:
    """Rank 0's reports, memory as bytes; a failure of its own if all are silent, or end too early."""
    heard, text, busy = time.monotonic(), b"", True
    while True:
        readable, _, _ = select.select([reader], [], [], _TICK if sampler.active else 1.0)
        if sampler.active:
            sampler.sample()
        if not readable:
            if time.monotonic() - heard > _SILENCE:
                yield {"event": "failed", "error": f"hangs: nothing was heard for {_SILENCE:g} s"}
                return
            continue
        heard = time.monotonic()
        data = os.read(reader, 1 << 16)
        if not data:
            if busy:
                yield {"event": "failed", "error": "its rank 0 died; what it wrote is above"}
            return
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "memory" and event["begin"]:
                sampler.begin()
            elif event["event"] == "memory":
                yield {**event, "bytes": sampler.end()}
            else:
                busy = event["event"] in ("ready", "begin")
                yield event
        if lines and not busy and event["event"] == "failed":
            return


def _fields(path: str) -> dict[str, int]:
    """Bytes by name, from lines like "Pss_Anon:  12 kB"; none if the process has gone."""
    try:
        with open(path) as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
