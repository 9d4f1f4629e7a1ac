"""The command line: `launch [options] train.py [args…]`, and `launch status RUN` and its like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from launcher import run
from launcher.cli.arguments import asks_a_job, configure, parse, split
from launcher.config.secret import VARIABLE
from launcher.errors import ExitCode, LaunchError

__all__ = ["main", "parse"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `launch` with `argv` (default: the process's own), and return its exit code."""
    _open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _control(words) if asks_a_job(words) else _launch(words)
    except LaunchError as error:
        sys.stderr.write(f"launch: {error}\n")
        return error.exit_code
    except Exception:
        import traceback  # only a defect needs it

        traceback.print_exc()
        sys.stderr.write("launch: this is a defect of launch itself; its workers are stopped\n")
        return ExitCode.INTERNAL
    except KeyboardInterrupt:  # before there was anything to stop, or after everything was
        return 128 + 2


def _open_streams() -> None:
    """Put /dev/null where a stream is closed (`launch … >&-`), or sockets would get the workers' descriptors."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _control(words: list[str]) -> int:
    from launcher.cli.job_commands import control  # a job that starts does not wait for it

    return control(words)


def _launch(words: list[str]) -> int:
    parsed = split(words)
    if parsed.asks_for("help"):
        from launcher.cli.help import help_text

        sys.stdout.write(help_text())
        return ExitCode.OK
    if parsed.asks_for("version"):
        from importlib.metadata import version  # takes as long as all else here

        sys.stdout.write(f"launch {version('shardckpt')}\n")
        return ExitCode.OK
    config = configure(parsed)
    os.environ.pop(VARIABLE, None)  # what workers do not know they cannot print
    return run(config)
