"""Turn a fork of the zygote into a worker."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, NoReturn

from launcher.system import processes

__all__ = ["draw_fresh_seeds", "enter_session", "execute", "skip_destructors"]


def enter_session(worker: dict[str, Any], zygote: int, handlers: dict[str, Any], files: int | None) -> None:
    """Begin a session that dies with the zygote, with the worker's streams, signals, file limit and environment.

    Args:
        worker: The `WorkerOrder`, as JSON.
        zygote: The zygote's process ID.
        handlers: By name, the signal handlers that the worker should find.
        files: The soft limit of open files that the worker should find; None: as it is.
    """
    os.setsid()
    processes.die_with_parent(zygote)
    processes.allow_tracing()
    for path, fd in ((worker["out"], 1), (worker["err"], 2)):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, fd)
        os.close(log)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)
    if files is not None:
        processes.restore_file_limit(files)
    os.environ.update(worker["environment"])


def draw_fresh_seeds() -> None:
    """Draw the seeds and keys that a fresh interpreter would have drawn. `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)


def skip_destructors() -> None:
    """Let this process end without the C destructors of the libraries that are loaded now.

    With torch, the end of a plain interpreter takes 1.6 times the CPU and copies 10,000 more pages in each
    worker, when all end at the same time (scripts/bench/ends). What Python does at its end still runs, and so
    does what is registered in C from now on, as by libraries that the script loads. Nothing changes under
    LD_PRELOAD: a profiler may write its report last.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit") and "LD_PRELOAD" not in os.environ:  # only glibc has it
        libc.on_exit(libc._exit, None)  # runs last, with the exit code
        libc.on_exit(libc.fcloseall, None)


def execute(command: list[str]) -> NoReturn:
    """Replace this process by the command; exit with 126 or 127, as a shell does, if it cannot be executed."""
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them; other programs do not expect that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"launch: {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
