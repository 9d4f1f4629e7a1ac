"""Parts: what each process of a save wrote, found by listing where they lie.

A part and a failure marker have names of their own for each save, so that whatever other saves have left at the
same place is never taken for one of this save.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from shardckpt.errors import FormatError
from shardckpt.format.manifest import (
    Part,
    WrittenPack,
    marked_rank,
    marker_path,
    part_path,
    parts_folder,
)
from shardckpt.format.manifest_codec import decode_part, encode_record
from shardckpt.run.failure_reports import raise_failure
from shardckpt.storage import Storage
from shardckpt.storage.parallel import in_parallel

__all__ = ["PartCollector", "write_part"]

_THREADS = 16
"""Parts that are read at one time."""

_ASK_EVERY = 1.0  # seconds


def write_part(storage: Storage, part: Part) -> None:
    """Write a part of a save whose packs are durable already. Raises StorageError.

    The part is durable when this returns: whoever sees it can rely on its packs.
    """
    storage.write(part_path(part.id, min(pack.rank for pack in part.packs)), encode_record(part))


class PartCollector:
    """Collects the parts of one save.

    Args:
        storage: the checkpoint's folder.
        save_id: the save's.
        world_size: number of its ranks.
        ask_every: seconds without news from listings after which a part is asked for by its name.
    """

    def __init__(
        self, storage: Storage, save_id: str, world_size: int, *, ask_every: float = _ASK_EVERY
    ) -> None:
        self._storage = storage
        self._id = save_id
        self._size = world_size
        self._found: dict[int, WrittenPack] = {}
        self._read: set[str] = set()  # names of the parts that have been read
        self._ask_every = ask_every
        self._asked = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """True if the packs of all ranks are known."""
        return len(self._found) == self._size

    @property
    def packs(self) -> list[WrittenPack]:
        """What is known, by rank."""
        return [self._found[rank] for rank in sorted(self._found)]

    def missing(self) -> list[int]:
        """The ranks whose packs are not known, in ascending order."""
        return [rank for rank in range(self._size) if rank not in self._found]

    def add(self, part: Part) -> None:
        """Take in a part. Other saves' ranks, and other saves' parts, are left out."""
        if part.id == self._id:
            self._found.update({pack.rank: pack for pack in part.packs if pack.rank < self._size})

    def look(self) -> bool:
        """Read what has come since the last look. Returns True if that was anything.

        Where listings show nothing new for `ask_every`, this asks for a part by its name, which is that of the
        lowest missing rank, whatever ranks it covers. So parts are found even if listings are out of date.

        Raises SaveError if a rank that is missing has a failure marker.
        """
        folder = parts_folder(self._id)
        names = self._storage.list(folder)
        marked = {name: rank for name in names if (rank := marked_rank(name)) is not None}
        has_news = self._read_parts([name for name in names if name not in marked])
        for name, rank in marked.items():
            if rank not in self._found:
                self._raise_failure(f"{folder}/{name}", rank)
        if has_news or self.is_complete:
            self._asked = time.monotonic()
        elif time.monotonic() - self._asked >= self._ask_every:
            has_news = self._ask()
            self._asked = time.monotonic()
        return has_news

    def _ask(self) -> bool:
        """Ask for the part of the lowest missing rank, and for its marker, without a listing."""
        lowest = self.missing()[0]
        if self._read_parts([part_path(self._id, lowest).rpartition("/")[2]]):
            return True
        self._raise_failure(marker_path(self._id, lowest), lowest)
        return False

    def _read_parts(self, names: Iterable[str]) -> bool:
        """Read the parts with these names that have not been read. Returns True if there was one."""
        unread = [name for name in names if name not in self._read]
        parts = in_parallel(self._read_part, unread, _THREADS)
        for name, part in zip(unread, parts, strict=True):
            if part is not None:
                self._read.add(name)
                self.add(part)
        return any(parts)

    def _read_part(self, name: str) -> Part | None:
        """The part of this name; None if it is not there yet, or cannot be read now."""
        try:
            return decode_part(self._storage.read(f"{parts_folder(self._id)}/{name}"), self._storage.url)
        except (FileNotFoundError, FormatError):
            return None

    def _raise_failure(self, path: str, rank: int) -> None:
        raise_failure(self._storage, path, self._id, f"rank {rank} of {self._storage.url}")
