"""The command `shardckpt`: list, inspect, verify, export and copy checkpoints.

Results go to stdout, errors and progress to stderr. `commands/` has one module for each verb; a call imports the
module of its own verb only, and torch only to write a `.pt` file.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from shardckpt.cli.exit_codes import BROKEN_PIPE, INTERRUPTED, UsageError, exit_code
from shardckpt.cli.output import print_json, printable
from shardckpt.cli.parsing import parse
from shardckpt.errors import ShardckptError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments behind the command's name. By default those of this process; then SIGINT and SIGTERM
            interrupt the command, so that it deletes what it has half written.

    Returns the exit code. Raises for bugs only.
    """
    if argv is not None:
        return _run(list(argv))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return _run(sys.argv[1:])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to clean up: end without a message
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    try:
        command, options = parse(arguments)
        code = command.run(options)
        sys.stdout.flush()
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except BrokenPipeError:
        return _close_stdout()
    except KeyboardInterrupt as interrupt:
        left = "; ".join(_notes(interrupt)) or "nothing half-written is left"
        print(f"shardckpt: interrupted; {printable(left)}", file=sys.stderr)
        return INTERRUPTED
    except (UsageError, ShardckptError, OSError) as error:
        return _report(error, as_json="--json" in arguments)
    return code


def _report(error: Exception, *, as_json: bool) -> int:
    """Print an error as one line on stderr, and as a JSON document on stdout if asked. Returns the exit code."""
    code = exit_code(error)
    line = " ".join("; ".join([_message(error).rstrip(), *_notes(error)]).split()) or type(error).__name__
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": line, "exit_code": code}})
    print(f"shardckpt: {printable(line)}", file=sys.stderr)
    return code


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ShardckptError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _notes(error: BaseException) -> list[str]:
    """The notes that were added to an error on its way: which output is left behind, and where."""
    return list(getattr(error, "__notes__", ()))


def _close_stdout() -> int:
    """The reader of stdout has gone (`| head`): end without a message, as other tools do."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return BROKEN_PIPE


def _interrupt(*_: object) -> NoReturn:
    """Interrupt the command. Further signals are ignored, so that they do not cut its cleanup short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
