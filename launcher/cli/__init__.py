"""The command line: `launch [options] train.py [args...]`, and the commands that ask a running job."""

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
        return _ask_job(words) if asks_a_job(words) else _launch(words)
    except LaunchError as error:
        sys.stderr.write(f"launch: {error}\n")
        return error.exit_code
    except Exception:
        import traceback  # only for a defect

        traceback.print_exc()
        sys.stderr.write("launch: this is a defect of launch itself; its workers are stopped\n")
        return ExitCode.INTERNAL
    except KeyboardInterrupt:  # before there was anything to stop, or after everything was
        return 128 + 2


def _open_streams() -> None:
    """Open /dev/null for closed streams (`launch ... >&-`), or sockets would get descriptors 0 to 2."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _ask_job(words: list[str]) -> int:
    from launcher.cli.job_commands import run_job_command  # the start of a job does not wait for it

    return run_job_command(words)


def _launch(words: list[str]) -> int:
    line = split(words)
    if line.has("help"):
        from launcher.cli.help import help_text

        sys.stdout.write(help_text())
        return ExitCode.OK
    if line.has("version"):
        from importlib.metadata import version  # as slow as all the rest here

        sys.stdout.write(f"launch {version('shardckpt')}\n")
        return ExitCode.OK
    config = configure(line)
    os.environ.pop(VARIABLE, None)  # workers cannot print a secret that they do not get
    return run(config)
