"""Names of files inside a storage."""

from __future__ import annotations

import uuid

from shardckpt.errors import StorageError

__all__ = ["is_temporary", "join", "temporary_name"]

_TEMPORARY = ".shardckpt-"


def temporary_name() -> str:
    """A name for a file that is not, or not yet, content. No two calls give the same."""
    return f"{_TEMPORARY}{uuid.uuid4().hex}"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` made this name."""
    return name.startswith(_TEMPORARY)


def join(base: str, path: str) -> str:
    """The path below `base`, which may be empty. An empty path is the base itself.

    Raises StorageError for a path that is not strictly below.
    """
    if not path:
        return base
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(
            f"{path!r} is no path below {base or 'the root'}: it must be relative, with names "
            "separated by single slashes, and without '.' and '..'"
        )
    if not base:
        return path
    return base + path if base.endswith("/") else f"{base}/{path}"
