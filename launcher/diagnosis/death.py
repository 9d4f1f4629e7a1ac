"""How workers died, read from what they left behind: error files, logs, the kernel's counters."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

from launcher.diagnosis.reports import Death
from launcher.diagnosis.tracebacks import LastWords, read_last_words
from launcher.events import WorkerExited
from launcher.progress import read_progress
from launcher.run_dir import RankFiles
from launcher.system.oom import OomWatch

__all__ = ["DATA_WORKER", "gather"]


_TAIL_BYTES = 64 * 1024


DATA_WORKER = r"DataLoader worker \(pid(?:\(s\))? (\d+)"


def gather(
    files: RankFiles,
    exit: WorkerExited,
    host: str,
    epoch_at: float,
    oom: OomWatch | None,
    is_ours: bool,
    said_before: int | None = None,
) -> Death:
    """Read what a failed worker left behind.

    `epoch_at` is its death in seconds since the epoch; `is_ours`, whether launch had told it to end. Of one
    that answers such a signal itself, `said_before` is how many bytes it had written to stderr when it was
    told: a traceback that begins later is its answer, and no failure.
    """
    words = _read_words(files, exit.code)
    if is_ours and said_before is not None:
        words = replace(words, has_traceback=_has_traceback(files.err, said_before))
    progress = read_progress(files.progress)
    return Death(
        rank=exit.rank,
        host=host,
        pid=exit.pid,
        code=exit.code,
        at=epoch_at,
        step=progress.step if progress else None,
        error=words.error,
        lines=words.lines,
        has_traceback=words.has_traceback,
        kill=_find_killer(exit, words, oom, is_ours),
        log=str(files.err),
        is_ours=is_ours,
        has_joined=progress is not None,
    )


def _read_words(files: RankFiles, code: int) -> LastWords:
    recorded = _read_error_file(files.error)
    if recorded is not None:
        message, stack = recorded
        words = read_last_words(stack.splitlines())
        if words.has_traceback:
            return words
    words = read_last_words(_read_tail(files.err), was_killed=code < 0)
    if not words.lines:
        words = LastWords(read_last_words(_read_tail(files.out)).lines)
    if recorded is not None and not words.has_traceback:
        return LastWords(words.lines, False, message.partition("\n")[0])
    return words


def _read_tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # What a progress bar showed last is all that counts of it.
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]


def _has_traceback(path: Path, end: int) -> bool:
    """Whether a traceback begins before byte `end` of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, end - _TAIL_BYTES))
            return b"Traceback (most recent call last):" in file.read(min(end, _TAIL_BYTES))
    except OSError:
        return False


def _read_error_file(path: Path) -> tuple[str, str] | None:
    """Message and call stack that torchelastic's @record wrote."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return message, message
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_killer(exit: WorkerExited, words: LastWords, oom: OomWatch | None, is_ours: bool) -> str | None:
    if oom is None:
        return None
    if exit.code == -signal.SIGKILL:
        return None if is_ours else oom.explain(exit.pid)
    child = re.search(DATA_WORKER, words.error or "")
    if child and "Killed" in (words.error or ""):
        found = oom.explain(int(child[1]))
        return f"its DataLoader worker was {found}" if found else None
    return None
