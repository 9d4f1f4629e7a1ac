"""How a worker died, read from what it left behind: its error file, its logs, the kernel's counters."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

from launcher.diagnosis.reports import Death
from launcher.diagnosis.tracebacks import DATALOADER_WORKER, LastWords, read_last_words
from launcher.events import WorkerExited
from launcher.progress import read_progress
from launcher.run_dir import RankFiles
from launcher.system.oom import OomWatch

__all__ = ["read_death"]

_TAIL_BYTES = 64 * 1024  # of a log that are read


def read_death(
    files: RankFiles,
    exit: WorkerExited,
    host: str,
    epoch_at: float,
    oom: OomWatch | None,
    is_ours: bool,
    said_before: int | None = None,
) -> Death:
    """Read what a failed worker left behind. Files that are missing or garbled are no evidence, and no error.

    Args:
        files: where it wrote.
        exit: its exit.
        host: the host that it ran on.
        epoch_at: when it died, in seconds since the epoch.
        oom: the kernel's counters since the round's start; None if they cannot be read.
        is_ours: True if `launch` had sent it a signal to end it.
        said_before: of a worker that handles that signal itself, the bytes that it had written to stderr when
            the signal was sent: a traceback that begins later answers the signal, and is no failure.
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
    """The last words in the error file; without a traceback there, those on stderr, or else on stdout."""
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
    """The last lines of a log; none if it cannot be read."""
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
    """True if a traceback begins before byte `end` of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, end - _TAIL_BYTES))
            return b"Traceback (most recent call last):" in file.read(min(end, _TAIL_BYTES))
    except OSError:
        return False


def _read_error_file(path: Path) -> tuple[str, str] | None:
    """The message and the call stack that torchelastic's @record wrote; None without such a file."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return message, message
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_killer(exit: WorkerExited, words: LastWords, oom: OomWatch | None, is_ours: bool) -> str | None:
    """Who sent the SIGKILL that ended a worker or its DataLoader worker; None if that is not known."""
    if oom is None:
        return None
    if exit.code == -signal.SIGKILL:
        return None if is_ours else oom.explain(exit.pid)
    child = re.search(DATALOADER_WORKER, words.error or "")
    if child and "Killed" in (words.error or ""):
        found = oom.explain(int(child[1]))
        return f"its DataLoader worker was {found}" if found else None
    return None
