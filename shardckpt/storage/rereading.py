"""Read again, past caches, what was found to be wrong, before it is called damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from shardckpt.errors import CorruptError, FormatError
from shardckpt.storage.protocol import Storage

__all__ = ["read_twice", "warn_misread"]

_log = logging.getLogger("shardckpt")

T = TypeVar("T")


def read_twice(storage: Storage, read: Callable[[Storage], T]) -> T:
    """The result of `read(storage)`.

    If it raises CorruptError or FormatError, it is called once more with `storage.fresh()`, since a bit may have
    flipped on the way; the second outcome counts.
    """
    try:
        return read(storage)
    except (CorruptError, FormatError) as error:
        first = error
    result = read(storage.fresh())
    warn_misread(str(first))
    return result


def warn_misread(what: str) -> None:
    """Log that data was wrong when it was read first, and right when it was read again."""
    _log.warning(
        "%s But read again it is right: nothing is wrong with what is stored. Have this machine's memory, its "
        "network and its disks checked",
        what if what.endswith(".") else f"{what}.",
    )
