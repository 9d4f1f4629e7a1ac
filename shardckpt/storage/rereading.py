"""Reading again what was found to be wrong, before anything is called damaged."""

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
    """What `read` makes of the storage.

    If it raises CorruptError or FormatError, which may come of a bit that flipped on the way, it is called once
    more with the storage past its caches, and what comes of that counts.
    """
    try:
        return read(storage)
    except (CorruptError, FormatError) as error:
        first = error
    result = read(storage.fresh())
    warn_misread(str(first))
    return result


def warn_misread(what: str) -> None:
    """Log that what was read first was wrong, and is right when it is read again."""
    _log.warning(
        "%s But read again it is right: nothing is wrong with what is stored. Have this machine's memory, its "
        "network and its disks checked",
        what if what.endswith(".") else f"{what}.",
    )
