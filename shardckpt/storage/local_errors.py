"""The operating system's errors about files, as this library's."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from shardckpt.errors import (
    CredentialsError,
    OutOfReachError,
    ShardckptError,
    StorageError,
    StorageFullError,
)

__all__ = ["NO_SPACE", "check_space", "explained"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_REACH = {  # of a network file system whose server does not answer
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
_IN_CONTRACT = {"read": FileNotFoundError, "create": FileExistsError}
"""Errors that `Storage` promises to raise as they are, by the kind of call."""


@contextlib.contextmanager
def explained(verb: str, path: str, wanted: int = 0) -> Iterator[None]:
    """Raise OSErrors of the block as StorageErrors that name the path and the remedy.

    Args:
        verb: what was attempted: "read", "write", "create", "list" or "delete". FileNotFoundError from a read
            and FileExistsError from a create are raised as they are.
        path: the full path of the file or folder.
        wanted: bytes to be written, for the message of a full disk.
    """
    try:
        yield
    except ShardckptError:
        raise
    except OSError as error:
        if isinstance(error, _IN_CONTRACT.get(verb, ())):
            raise
        raise _explain(error, verb, path, wanted) from error


def check_space(folder: str, nbytes: int) -> None:
    """Raise OSError (ENOSPC), for `explained`, if the file system of `folder` has less than `nbytes` free."""
    if _free_bytes(folder) < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _explain(error: OSError, verb: str, path: str, wanted: int) -> StorageError:
    text = f"cannot {verb} {path}"
    explained: StorageError
    if error.errno in NO_SPACE:
        explained = StorageFullError(
            f"{text}: {error.strerror}; wanted {wanted} bytes, {_free_bytes(path)} are free. Free some, "
            "raise the quota, or choose another place"
        )
    elif error.errno in (errno.EACCES, errno.EPERM):
        explained = CredentialsError(
            f"{text}: {error.strerror}, as user {os.geteuid()}. Change the permissions of the file or its "
            "folder, or choose another place"
        )
    elif error.errno == errno.EROFS:
        explained = StorageError(f"{text}: the file system is mounted read-only. Choose another place")
    else:
        kind = OutOfReachError if error.errno in _OUT_OF_REACH else StorageError
        explained = kind(f"{text}: {error.strerror or error}")
    explained.errno = error.errno
    return explained


def _free_bytes(path: str) -> int:
    """Bytes that are free where `path` is, or would be."""
    while not os.path.isdir(path):  # noqa: PTH112, names on their way to system calls
        path = os.path.dirname(path)  # noqa: PTH120
    system = os.statvfs(path)
    return system.f_bavail * system.f_frsize
