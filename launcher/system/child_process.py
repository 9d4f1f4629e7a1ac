"""Child processes of the agent that may outlive it, connected by a stream of lines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ChildProcess", "module_command"]

_HOME = str(Path(__file__).parents[2])
_SCHEDULERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SEND_TIMEOUT = 5.0  # seconds; a process that reads nothing for so long is killed


def module_command(name: str) -> tuple[str, ...]:
    """The command that runs a module of this installation, whatever lies in the current directory."""
    return (sys.executable, "-P", "-m", name)


class ChildProcess:
    """A running process that leads a session of its own, and a stream socket between it and this one.

    It gets an empty stdin, and this package's parent directory on its path. Signals that schedulers send to
    every process of a job are blocked in it, so that they are pending until it ignores them.

    Args:
        command: the program and its arguments; the descriptor of its end of the socket is appended.
        log: the file to which its stdout and stderr are appended.
        inherits: descriptors that it gets under the same numbers.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], log: Path, *, inherits: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        path = (os.environ.get("PYTHONPATH"), _HOME)
        with theirs, open(log, "ab") as output:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULERS)
            try:
                self._popen = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
                    pass_fds=[*inherits, theirs.fileno()],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._socket = ours
        self._unread = b""
        self._has_hung_up = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when there are lines to read, or when the process is dead."""
        return (self._pidfd,) if self._has_hung_up else (self._socket.fileno(), self._pidfd)

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it runs."""
        return self._popen.poll()

    def wait(self, seconds: float) -> None:
        """Wait until it is dead, for at most `seconds`."""
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pass

    def read(self) -> list[bytes]:
        """The lines that it has written since the last call; does not wait."""
        self._socket.settimeout(0)
        while received := self._receive():
            self._unread += received
        *lines, self._unread = self._unread.split(b"\n")
        return lines

    def _receive(self) -> bytes:
        try:
            received = self._socket.recv(1 << 16)
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            received = b""
        self._has_hung_up = not received
        return received

    def send(self, line: bytes) -> None:
        """Send it a line. A process that does not read for five seconds is killed; a dead one is ignored."""
        self._socket.settimeout(_SEND_TIMEOUT)
        try:
            self._socket.sendall(line + b"\n")
        except TimeoutError:
            self._popen.kill()
        except (BrokenPipeError, ConnectionResetError):
            pass

    def end_input(self) -> None:
        """Shut the socket down for writing: the process reads end of file."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is dead, as `poll` returns

    def close(self) -> None:
        """Close the socket; the process goes on until it reads end of file."""
        self._socket.close()
        os.close(self._pidfd)
