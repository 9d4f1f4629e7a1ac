"""The seam: what the library asks of a storage, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias, runtime_checkable

from shardckpt.errors import FormatError

__all__ = ["MAX_WHOLE", "Before", "Storage", "check_whole"]

Before: TypeAlias = Callable[[int, int], object]
"""Called with (start, stop) of a block of a buffer before its bytes are written; may still change them."""


MAX_WHOLE = 1 << 30
"""Bytes of the largest file that is read whole, without saying how much of it is wanted."""


def check_whole(name: str, size: int) -> int:
    """The size of a file that is to be read whole. Raises FormatError if that is more than any has."""
    if size > MAX_WHOLE:
        raise FormatError(f"{name} has {size} bytes: no file of this kind has more than {MAX_WHOLE}")
    return size


@runtime_checkable
class Storage(Protocol):
    """A folder of files or objects. Synchronous; safe to use from several threads.

    A `path` is relative to the folder, with `/` between names, and never leaves it: an absolute
    path, an empty name, `.` and `..` are refused with StorageError. Folders come into being with
    their first file. Every error is a StorageError that names the URL, or one of the three that
    are a part of the contract: FileNotFoundError, FileExistsError, CorruptError. What is there and is no file,
    like a FIFO, is a FormatError.
    """

    @property
    def url(self) -> str:
        """The canonical URL: an absolute path for local storage, else `protocol://place/folder`."""

    def at(self, path: str) -> Storage:
        """The folder `path` below. Touches nothing."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, fewer where it ends before `stop`, as in a slice.

        Without `stop` it is for small files, and larger ones than `MAX_WHOLE` may be refused with
        FormatError. Raises FileNotFoundError if there is no such file.
        """

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file from `offset` on.

        Raises FileNotFoundError if there is no such file, and CorruptError if it ends too early;
        the buffer's content is undefined then.
        """

    def size(self, path: str) -> int:
        """The number of bytes in a file. Raises FileNotFoundError if there is no such file."""

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put a small file there whole or not at all, in place of any earlier one.

        Durable when it returns.
        """

    def create(self, path: str, data: bytes) -> None:
        """Put a small file there, whole or not at all, only if none is there.

        Durable when it returns. Raises FileExistsError if there is one, which is left as it is.
        Of several racers exactly one wins, if `exclusive()`.
        """

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        """Put a large file there, in place of any earlier one, straight from `buffer`.

        Durable when it returns. After a failure some of it may remain on a local disk. One writer
        per path at a time.

        `before(start, stop)` is called once for each block of the buffer's bytes, in ascending order and
        one call at a time, from any thread: together the blocks are all of it, and an empty buffer has
        none. It may change bytes from `start` on, as checksums are filled in. Meanwhile blocks before are
        on their way. Apart from that the buffer must not change before `write_pack` returns. What
        `before` raises is raised here. It must not wait for a storage itself.
        """

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        """Put a large file of `size` bytes there, in place of any earlier one, piece by piece.

        The pieces, of any lengths, are asked for by the calling thread, in order; each one's memory may be used
        again once the next one is asked for. What they raise is raised here, and then the file is not there, or
        not complete. Durable when it returns. Holds about 128 MiB at most. One writer per path at a time.
        """

    def list(self, path: str = "") -> list[str]:
        """The sorted names of the files and folders right below; [] if there is no such folder.

        Temporary files of this library are left out.
        """

    def sizes(self, path: str = "") -> dict[str, int]:
        """The bytes of every file below, by its path from there; {} if there is no such folder.

        Takes a request for a thousand files or so, not one for each. Temporary files of this library are left
        out, and so is what `size` refuses.
        """

    def delete(self, path: str) -> None:
        """Remove a file for good. An absent one is fine."""

    def delete_tree(self, path: str) -> None:
        """Remove a folder and all that is in it, in no particular order. An absent one is fine."""

    def fresh(self) -> Storage:
        """The same folder, read past caches: from the disk itself, or over connections of its own.

        For reading again what was found to be wrong; slower than the folder itself.
        """

    def exclusive(self) -> bool:
        """Whether `create` refuses to overwrite even in a race.

        False for an object store without conditional puts; there `create` is only a check and a
        write. Asked of the store itself, once, at the first call.
        """
