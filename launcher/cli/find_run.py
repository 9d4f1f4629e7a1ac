"""The run directory that a command means."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.ask import is_running
from launcher.errors import NotRunningError, UnreachableError, UsageError
from launcher.reporting.journal import JOURNAL

__all__ = ["find_run"]

_RUNS = Path("runs")


def find_run(name: str | None) -> Path:
    """The run directory called `name`, or `name` in runs/; without a name, the run that is running there.

    Raises:
        UsageError: There is no such run, or several are running.
        NotRunningError: No name is given, and nothing is running.
        UnreachableError: The directory is closed to this user.
    """
    if name is None:
        return _only_run()
    for path in (Path(name), _RUNS / name):
        try:
            if name and _is_run(path):
                return path
        except PermissionError:
            raise UnreachableError(
                f"{path} is closed to this user: ask as the user whose job it is"
            ) from None
        except OSError:
            pass  # too long for the name of any file
    others = ", ".join(path.name for path in _runs())
    raise UsageError(
        f"no run {name or repr(name)}: expected a run directory, or a name in runs/"
        + (f": {others}" if others else "")
    )


def _only_run() -> Path:
    runs = _runs()
    running = [path for path in runs if is_running(path)]
    if len(running) > 1:
        names = ", ".join(path.name for path in running)
        raise UsageError(f"several jobs run in runs/: name one of {names}")
    if running or len(runs) == 1:
        return (running or runs)[0]
    raise NotRunningError("nothing runs in runs/: name a run directory")


def _runs() -> list[Path]:
    try:
        return [path for path in sorted(_RUNS.iterdir()) if _is_run(path)]
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    try:
        return any((path / mark).exists() for mark in ("lock", JOURNAL, "nodes"))
    except OSError:  # closed to this user: `ask` says whose it is
        return path.is_dir()
