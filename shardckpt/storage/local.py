"""Folders on local and mounted file systems."""

# Names here are strings on their way to system calls, beside descriptors, for which Path has none.
# ruff: noqa: PTH105, PTH108, PTH115, PTH120, PTH121, PTH208
from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from shardckpt.errors import CorruptError, FormatError, OutsideLinkError
from shardckpt.storage import direct
from shardckpt.storage.buffers import as_bytes
from shardckpt.storage.folders import DurableFolders, is_folder, remove_tree, sync_folder
from shardckpt.storage.local_errors import NO_SPACE, explained
from shardckpt.storage.local_file import LocalFile
from shardckpt.storage.names import is_temporary, join, temporary_name
from shardckpt.storage.protocol import Before, check_whole
from shardckpt.storage.work import cleanup

__all__ = ["LocalStorage"]

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors for a path where no folder is or can be: a link in a circle leads to none."""
_NO_FILE = (errno.ENXIO, errno.ENODEV, errno.ELOOP)


class LocalStorage:
    """A folder. See `Storage` for what each method guarantees.

    Args:
        path: its absolute path.
        past_caches: whether reads come from the disk itself, not from the page cache.
        follow_links: whether files are also read where a symbolic link leads out of the folder.
        folders: the folders of the storage that this one is a part of; by default this is the root.
    """

    def __init__(
        self,
        path: str,
        *,
        past_caches: bool = False,
        follow_links: bool = False,
        folders: DurableFolders | None = None,
    ) -> None:
        self._path = path
        self._past_caches = past_caches
        self._follow_links = follow_links
        self._folders = DurableFolders(path) if folders is None else folders

    @property
    def url(self) -> str:
        return self._path

    def __repr__(self) -> str:
        return f"LocalStorage({self._path!r})"

    def __reduce__(self) -> tuple[Callable[..., LocalStorage], tuple[str]]:
        return partial(LocalStorage, follow_links=self._follow_links), (self._path,)

    def at(self, path: str) -> LocalStorage:
        return LocalStorage(
            join(self._path, path, self._path),
            past_caches=self._past_caches,
            follow_links=self._follow_links,
            folders=self._folders,
        )

    def fresh(self) -> LocalStorage:
        return LocalStorage(
            self._path,
            past_caches=True,
            follow_links=self._follow_links,
            folders=self._folders,
        )

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._opened(path) as (fd, full):
            end = os.fstat(fd).st_size
            stop = check_whole(full, end) if stop is None else min(stop, end)
            if self._past_caches:
                data = bytearray(max(0, stop - start))
                with explained("read", full):
                    found = direct.read_file(fd, start, memoryview(data))
                return bytes(data[:found])
            with explained("read", full):
                pieces = []
                while start < stop and (piece := os.pread(fd, stop - start, start)):
                    pieces.append(piece)
                    start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        found, wanted, view = 0, buffer.nbytes, as_bytes(buffer)
        with self._opened(path) as (fd, full), explained("read", full):
            if self._past_caches:
                found = direct.read_file(fd, offset, view)
            else:
                while found < wanted and (n := os.preadv(fd, [view[found:]], offset + found)):
                    found += n
        if found < wanted:
            raise CorruptError(
                f"{full} is truncated: wanted {wanted} bytes at offset {offset}, found {found}"
            )

    def size(self, path: str) -> int:
        with self._opened(path) as (fd, _):
            return os.fstat(fd).st_size

    def open_file(self, path: str) -> LocalFile:
        """Open a file for many reads. Raises as `read` does."""
        with self._opened(path) as (fd, full):
            return LocalFile(os.dup(fd), full)

    def write(self, path: str, data: bytes | memoryview) -> None:
        full = join(self._path, path, self._path)
        with explained("write", full, memoryview(data).nbytes), self._temporary(full, data) as temporary:
            os.replace(temporary, full)
            sync_folder(os.path.dirname(full))

    def create(self, path: str, data: bytes) -> None:
        full = join(self._path, path, self._path)
        with explained("create", full, len(data)), self._temporary(full, data) as temporary:
            try:
                os.link(temporary, full)
            except FileExistsError:
                # Over NFS the reply to a successful link may be lost, and its repetition fails.
                if not os.path.samefile(temporary, full):
                    raise
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                _create_in_place(full, data)
            sync_folder(os.path.dirname(full))

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        with self._new_file(path, buffer.nbytes) as full:
            try:
                direct.write_file(full, as_bytes(buffer), before)
            except OSError as error:
                if error.errno in NO_SPACE:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(full)
                raise

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        with self._new_file(path, size) as full:
            try:
                direct.write_pieces(full, size, pieces)
            except BaseException as error:
                with cleanup(error, f"an unfinished {full} may be left"):
                    os.unlink(full)
                raise

    def list(self, path: str = "") -> list[str]:
        full = join(self._path, path, self._path)
        with explained("list", full):
            try:
                return sorted(name for name in os.listdir(full) if not is_temporary(name))
            except OSError as error:
                if error.errno not in _NOTHING:
                    raise
                return []

    def sizes(self, path: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        linked: set[str] = set()
        waiting = [path]
        while waiting:
            folder = waiting.pop()
            full = join(self._path, folder, self._path)
            with explained("list", full):
                try:
                    entries = list(os.scandir(full))
                except OSError as error:
                    if error.errno not in _NOTHING:
                        raise
                    continue
            for entry in entries:
                if is_temporary(entry.name):
                    continue
                below = f"{folder}/{entry.name}" if folder else entry.name
                if is_folder(entry):
                    real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                    if not real or (real not in linked and (self._follow_links or self._is_inside(real))):
                        linked.add(real)
                        waiting.append(below)
                    continue
                with contextlib.suppress(FileNotFoundError, FormatError):
                    regular = entry.is_file(follow_symlinks=False)
                    size = entry.stat(follow_symlinks=False).st_size if regular else self.size(below)
                    found[below[len(path) :].lstrip("/")] = size
        return found

    def delete(self, path: str) -> None:
        full = join(self._path, path, self._path)
        with explained("delete", full):
            try:
                os.unlink(full)
            except (FileNotFoundError, NotADirectoryError):
                return
            sync_folder(os.path.dirname(full))

    def delete_tree(self, path: str) -> None:
        full = join(self._path, path, self._path)
        with explained("delete", full):
            self._folders.forget(full)
            try:
                remove_tree(full)
            except (FileNotFoundError, NotADirectoryError):
                return
            sync_folder(os.path.dirname(full))

    def exclusive(self) -> bool:
        return True

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, str]]:
        """Open a regular file for reading: its descriptor and full path.

        Raises FileNotFoundError; FormatError for what is no regular file, since a read might block for ever, and
        for a symbolic link that leads out of the storage's root, unless links are followed.
        """
        full = join(self._path, path, self._path)
        with explained("read", full):
            try:
                # O_NONBLOCK: a FIFO may never have a writer. Regular files are not affected.
                fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), full) from None
                if error.errno not in _NO_FILE:
                    raise
                what = "a link in a circle" if error.errno == errno.ELOOP else "a socket or a device"
                raise FormatError(f"{full} cannot be read: it is {what}, and not a file") from error
        try:
            kind = os.fstat(fd).st_mode
            if stat.S_ISDIR(kind):
                raise FileNotFoundError(errno.ENOENT, "No such file (there is a folder)", full)
            if not stat.S_ISREG(kind):
                raise FormatError(f"{full} cannot be read: it is a FIFO or a device, and not a file")
            if not self._follow_links:
                self._check_inside(fd, full)
            yield fd, full
        finally:
            os.close(fd)

    def _check_inside(self, fd: int, full: str) -> None:
        """Raise OutsideLinkError for an open file outside the root: links in a copied run may lead anywhere."""
        with contextlib.suppress(OSError):
            if self._is_inside(os.readlink(f"/proc/self/fd/{fd}")):
                return
        if not self._is_inside(real := os.path.realpath(full)):
            raise OutsideLinkError(
                f"{full} is {real}, by a symbolic link that leads out of {self._folders.root}, and is not read. "
                "If you trust it, give the option follow_links"
            )

    def _is_inside(self, real: str) -> bool:
        return real.startswith(os.path.realpath(self._folders.root).rstrip("/") + "/")

    @contextlib.contextmanager
    def _new_file(self, path: str, size: int) -> Iterator[str]:
        """The path of a file for the block to create, in place of an earlier one; its name becomes durable."""
        full = join(self._path, path, self._path)
        folder = os.path.dirname(full)
        with explained("write", full, size):
            self._folders.make(folder)
            # A new file: readers and mappings of the earlier one keep its content.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(full)
            yield full
            sync_folder(folder)

    @contextlib.contextmanager
    def _temporary(self, full: str, data: bytes | memoryview) -> Iterator[str]:
        """A durable file with `data` in the folder of `full`; its temporary name is removed at the end."""
        folder = os.path.dirname(full)
        self._folders.make(folder)
        temporary = f"{folder}/{temporary_name()}"
        try:
            _create_in_place(temporary, data)
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _create_in_place(full: str, data: bytes | memoryview) -> None:
    """Create a file and make its content durable. After a failure it is removed."""
    fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = as_bytes(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except BaseException:
        os.unlink(full)
        raise
    finally:
        os.close(fd)
