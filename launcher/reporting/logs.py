"""Follows log files: whole lines out of what workers write, when they write it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DirectoryWatch", "Lines", "Tail"]

_IN_MODIFY = 0x2


class Lines:
    """Cuts a stream of bytes into lines.

    A progress bar redraws its line after a carriage return: only its last state counts.
    """

    LIMIT = 1 << 20  # bytes; a longer line is cut

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > self.LIMIT:
            lines += self.flush()
        return [_last_drawn(line) for line in lines]

    @property
    def drawn(self) -> bytes:
        """The state of the progress bar that is being drawn; empty if none is."""
        return _last_drawn(self._partial) if b"\r" in self._partial else b""

    def flush(self) -> list[bytes]:
        """The incomplete last line, as a line; nothing if there is none."""
        partial, self._partial = self._partial, b""
        return [_last_drawn(partial)] if partial.strip(b"\r") else []


def _last_drawn(line: bytes) -> bytes:
    line = line.rstrip(b"\r")
    return line[line.rfind(b"\r") + 1 :]


class Tail:
    """Reads the lines of a growing file from its start."""

    CHUNK = 1 << 16

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset = 0
        self.lines = Lines()

    def read(self) -> Iterator[list[bytes]]:
        """The lines that are complete now, a chunk at a time. Stops at the size that the file has at the call."""
        size = os.fstat(self._fd).st_size
        while self._offset < size:
            data = os.pread(self._fd, self.CHUNK, self._offset)
            if not data:
                return
            self._offset += len(data)
            yield self.lines.feed(data)

    def close(self) -> None:
        os.close(self._fd)


class DirectoryWatch:
    """Becomes readable when a file in its directory is written to (inotify).

    Raises OSError where the system has no watches left.
    """

    def __init__(self, directory: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_MODIFY))

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        """Make it unreadable until the next write."""
        try:
            while os.read(self._fd, 1 << 16):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self._fd)

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
