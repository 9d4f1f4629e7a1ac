"""Names of files inside a storage."""

from __future__ import annotations

import uuid

from shardckpt.errors import StorageError

__all__ = ["is_temporary", "join", "temporary_name", "without_temporary"]

_TEMPORARY = ".shardckpt-"


def temporary_name() -> str:
    """A name for a file that is not content, or not yet. Each call returns another one."""
    return f"{_TEMPORARY}{uuid.uuid4().hex}"


def is_temporary(name: str) -> bool:
    """True for names that `temporary_name` returns."""
    return name.startswith(_TEMPORARY)


def without_temporary(path: str) -> str:
    """`path` for messages: its folder if it ends in a temporary name, which means nothing to users."""
    folder, _, name = path.rpartition("/")
    return folder if is_temporary(name) else path


def join(base: str, path: str, url: str) -> str:
    """Join a base, which may be empty, and a path below it. An empty path gives the base itself.

    Raises StorageError, which names the base by its `url`, for a path that is not strictly below.
    """
    if not path:
        return base
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(
            f"{url.rstrip('/')}/{path}: a path below {url} must be relative, with names between "
            "single slashes, and without '.' and '..'"
        )
    return f"{base.rstrip('/')}/{path}" if base else path
