"""Exit codes: what a script can do about a failure, by kind of error."""

from __future__ import annotations

import signal

from shardckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    MissingKeysError,
    NotACheckpointError,
    StorageError,
    UnknownVersionError,
)

__all__ = ["BROKEN_PIPE", "CORRUPT", "EXIT_CODES", "INTERRUPTED", "UsageError", "exit_code"]

EXIT_CODES = """\
exit codes:
  0    done; for verify: the checkpoint is good
  1    another failure
  2    the command line is wrong, or names something that the checkpoint lacks
  3    nothing is there, or no checkpoint, or one of a version that this
       release does not read
  4    the checkpoint is corrupt: stored bytes differ from what was written, or
       its manifest is invalid
  5    the storage is full, out of reach, or refuses the credentials
  6    the output exists already; it was left as it is
  130  interrupted (Ctrl-C); the message names what is left behind
"""

_FAILED = 1
_USAGE = 2
_NOT_A_CHECKPOINT = 3
CORRUPT = 4
_STORAGE = 5
_EXISTS = 6
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


class UsageError(Exception):
    """The command line is wrong; the text says what is wrong and what to type instead."""


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ended a command."""
    match error:
        case UsageError() | MissingKeysError():
            return _USAGE
        case CheckpointExistsError():
            return _EXISTS
        case NotACheckpointError() | UnknownVersionError():
            return _NOT_A_CHECKPOINT
        case CheckpointError():
            return CORRUPT
        case StorageError():
            return _STORAGE
    return _FAILED
