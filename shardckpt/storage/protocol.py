"""`Storage`: everything that the library asks of a place where checkpoints live."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias, runtime_checkable

from shardckpt.errors import FormatError

__all__ = ["MAX_WHOLE", "Before", "Storage", "check_whole"]

Before: TypeAlias = Callable[[int, int], object]
"""Called with (start, stop) of a block of a buffer before its bytes are written; may still change them."""


MAX_WHOLE = 1 << 30
"""Bytes of the largest file that is read whole, without a range."""


def check_whole(name: str, size: int) -> int:
    """The size of a file that is about to be read whole. Raises FormatError above `MAX_WHOLE`."""
    if size > MAX_WHOLE:
        raise FormatError(f"{name} has {size} bytes: no file of this kind has more than {MAX_WHOLE}")
    return size


@runtime_checkable
class Storage(Protocol):
    """A folder of files or objects. Synchronous; safe to use from several threads.

    Implement it for a place of your own, and pass an instance wherever a URL is taken.
    `tests/shardckpt/storage/test_contract.py` checks the guarantees below.

    A `path` is relative to the folder, with `/` between names, and never leaves it: an absolute path, an empty
    name, `.` and `..` raise StorageError. A folder exists once there is a file in it.

    Every error is a StorageError that names the URL, or one of four that callers rely on: FileNotFoundError and
    FileExistsError as the system raises them, CorruptError for a file that is too short, FormatError for what is
    no regular file (a FIFO, a device).
    """

    @property
    def url(self) -> str:
        """The canonical URL: an absolute path for local storage, else `protocol://place/folder`."""

    def at(self, path: str) -> Storage:
        """The folder at `path` below this one. Reads and writes nothing, and need not exist."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a part of a file.

        Args:
            path: the file.
            start: offset of the first byte.
            stop: offset behind the last byte; behind the file's end, the result is shorter, as in a slice. None
                stands for the end, for small files: above `MAX_WHOLE` bytes FormatError may be raised.

        Raises FileNotFoundError, also for a folder.
        """

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a file.

        Args:
            path: the file.
            offset: of the first byte in the file.
            buffer: contiguous, writable, of any shape and type. Its content is undefined after an error.

        Raises FileNotFoundError; CorruptError if the file ends before the buffer is full.
        """

    def size(self, path: str) -> int:
        """The length of a file in bytes. Raises FileNotFoundError, also for a folder."""

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Write a small file, whole or not at all, in place of any earlier one.

        It is durable when this returns: it survives a power cut. After an error either the earlier file is there
        or the new one.
        """

    def create(self, path: str, data: bytes) -> None:
        """Write a small file, whole or not at all, only if none is there.

        It is durable when this returns. Of several callers at the same time, on any machines, exactly one
        succeeds if `exclusive()`. Raises FileExistsError if there is a file, which is left as it is.
        """

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        """Write a large file straight from a buffer, in place of any earlier one.

        It is durable when this returns. After a failure some of it may remain on a local disk, and the earlier
        file may be gone. One writer per path at a time.

        Args:
            path: the file.
            buffer: contiguous, of any shape and type. It must not change before this returns, except by
                `before`.
            before: called once for each block of the buffer's bytes, in ascending order, one call at a time, from
                any thread, while earlier blocks are written. Together the blocks are the whole buffer. It may
                change bytes from `start` on, so that checksums are filled in. It must not use a storage. What it
                raises is raised here.
        """

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        """Write a large file piece by piece, in place of any earlier one. Holds about 128 MiB at most.

        It is durable when this returns. After a failure the file is not there, or not complete, and the earlier
        one may be gone. One writer per path at a time.

        Args:
            path: the file.
            size: its length in bytes.
            pieces: its content, in pieces of any length, `size` bytes in all. Consumed by the calling thread;
                the memory of a piece may be reused once the next one is asked for. What it raises is raised here.
        """

    def list(self, path: str = "") -> list[str]:
        """The sorted names of the files and folders right below `path`; [] if there is no such folder.

        Temporary files of this library are left out.
        """

    def sizes(self, path: str = "") -> dict[str, int]:
        """The length in bytes of every file below `path`, by its path from there; {} if there is no such folder.

        Takes one request for about a thousand files, not one for each. Temporary files of this library are left
        out, and what is no regular file.
        """

    def delete(self, path: str) -> None:
        """Remove a file for good. It need not exist."""

    def delete_tree(self, path: str) -> None:
        """Remove a folder and everything in it, in no particular order. It need not exist."""

    def fresh(self) -> Storage:
        """The same folder, read past caches: from the disk itself, or over connections of its own.

        Slower than the folder itself; for reading again what was found to be wrong.
        """

    def exclusive(self) -> bool:
        """True if `create` never overwrites, even in a race.

        False for an object store without conditional puts; there `create` checks, then writes. The first call
        asks the store by creating a temporary file twice; the answer is kept. Raises StorageError.
        """
