"""A local file that appears under its name only once it is complete and durable."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardckpt.errors import CheckpointExistsError, StorageError
from shardckpt.storage.folders import sync_folder
from shardckpt.storage.local_errors import check_space, explained

__all__ = ["check_target", "new_file"]


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be created at `path`.

    Raises CheckpointExistsError for a folder, and for a file unless `overwrite`; StorageError if the folder is
    missing.
    """
    with explained("write", str(path)):
        if not path.parent.is_dir():
            raise StorageError(f"cannot write {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise CheckpointExistsError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise CheckpointExistsError(
                f"{path} exists already; it was left as it is. To replace it, give --force (overwrite=True)"
            )


@contextlib.contextmanager
def new_file(path: Path, nbytes: int, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` in one step, durable, when the block ends without an error.

    Args:
        path: its name. After an error nothing is left, and what was there is unchanged.
        nbytes: how large it gets at least; less free space is an error before anything is written.
        overwrite: whether a file at `path` may be replaced.

    Raises CheckpointExistsError, CredentialsError, StorageFullError, StorageError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained("write", str(path), nbytes):
        check_space(str(path.parent), nbytes)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_target(path, overwrite=overwrite)
            temporary.replace(path)
            sync_folder(str(path.parent))
        finally:
            temporary.unlink(missing_ok=True)
