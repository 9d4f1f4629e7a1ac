"""The errors of `launch`, grouped by what the caller can do about them.

LaunchError              has the exit code that `launch` ends with
├── UsageError           change the command line or the configuration file
│   └── NotFoundError    the program after `--` does not exist
├── BusyError            wait for, or stop, the other job that holds the run directory or port
├── UnreachableError     run the command on the job's host and as its user, if it runs at all
│   └── NotRunningError  nothing: no job runs there
├── RunDirError          make the run directory writable, or choose another one
└── InternalError        nothing: the launcher itself failed
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "BusyError",
    "ExitCode",
    "InternalError",
    "LaunchError",
    "NotFoundError",
    "NotRunningError",
    "RunDirError",
    "UnreachableError",
    "UsageError",
    "shell_code",
]


class ExitCode(IntEnum):
    """Exit codes of `launch` that are not a worker's own.

    A job whose workers failed ends with the code of the worker that failed first, or 128 + its signal. A job that
    was stopped by a signal ends with 128 + that signal (130 for Ctrl-C), or with PREEMPTED if it has saved and
    can be resumed. docs/exit-codes.md has the list.
    """

    OK = 0
    BAD_USAGE = 2
    UNAVAILABLE = 69
    INTERNAL = 70
    CANNOT_WRITE = 73
    NOT_PERSISTED = 74
    PREEMPTED = 75
    HUNG = 76
    CRASH_LOOP = 77
    QUORUM_LOST = 78
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127


class LaunchError(Exception):
    """Base of all errors that `launch` reports without a traceback."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UsageError(LaunchError):
    """An option, a configuration file or a script that cannot be used; nothing was started."""

    exit_code = ExitCode.BAD_USAGE


class NotFoundError(UsageError):
    """The program to execute does not exist."""

    exit_code = ExitCode.NOT_FOUND


class BusyError(LaunchError):
    """Another process uses the run directory or the port."""

    exit_code = ExitCode.UNAVAILABLE


class UnreachableError(LaunchError):
    """No running job answers: none runs here, or it runs on another host or as another user."""

    exit_code = ExitCode.UNAVAILABLE


class NotRunningError(UnreachableError):
    """No job runs in the run directory."""


class RunDirError(LaunchError):
    """The run directory cannot be created or written."""

    exit_code = ExitCode.CANNOT_WRITE


class InternalError(LaunchError):
    """The launcher itself failed, for example to start a process."""


def shell_code(code: int) -> int:
    """The exit code that a shell reports for `code`, where a negative code is a signal's number."""
    return code if code >= 0 else 128 - code
