"""Local folders: making them so that they survive a power cut, and removing them."""

# Names here are strings on their way to system calls, beside descriptors, for which Path has none.
# ruff: noqa: PTH102, PTH106, PTH108, PTH112, PTH120
from __future__ import annotations

import contextlib
import errno
import os
import threading

from shardckpt.errors import StorageError

__all__ = ["DurableFolders", "is_folder", "remove_tree", "sync_folder"]

_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EACCES)


class DurableFolders:
    """Makes the folders below a root durable, and remembers which ones are. Safe for several threads.

    Args:
        root: an absolute path. Folders above it are made if they are missing, and else left alone.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._durable: set[str] = set()  # folders whose entry in their parent is on disk
        self._lock = threading.Lock()

    def make(self, folder: str) -> None:
        """Make a folder and its parents so that they survive a power cut.

        Folders that exist already, from the root down, are synchronised too: another process may have made them
        and not synchronised them yet. Raises StorageError if a file is in the way; OSError.
        """
        with self._lock:
            known = folder in self._durable
        if known and os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        if len(folder) > len(self.root) or not os.path.isdir(parent):
            self.make(parent)
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise StorageError(f"{folder} is in the way: it is a file, not a folder") from None
        sync_folder(parent)
        with self._lock:
            self._durable.add(folder)

    def forget(self, folder: str) -> None:
        """Drop what is remembered of a folder that is about to be removed, and of those below it."""
        with self._lock:
            self._durable -= {f for f in self._durable if f == folder or f.startswith(f"{folder}/")}


def sync_folder(folder: str) -> None:
    """Make the entries of a folder durable, if the file system can."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a folder that may be written to but not read
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder or a link to one; False also for a link in a circle."""
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def remove_tree(folder: str) -> None:
    """Remove a folder, which other processes may be removing too. Symbolic links are not followed."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                else:
                    os.unlink(entry.path)
    os.rmdir(folder)
