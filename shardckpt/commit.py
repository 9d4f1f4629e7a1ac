"""Commit: a checkpoint comes into being when every rank's part is in the storage.

The committer and the writers meet in the storage alone, so that a commit needs no collective and no
living trainer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.errors import FormatError, SaveError, ShardckptError, SupersededError
from shardckpt.manifest import (
    MANIFEST,
    REFS,
    Chunks,
    Manifest,
    Pack,
    Part,
    decode_part,
    encode_record,
    pack_path,
    part_path,
)
from shardckpt.plan import SavePlan
from shardckpt.runs import FAILED, Place, Succession, read_manifest, read_small, succession
from shardckpt.storage import Storage
from shardckpt.version import __version__
from shardckpt.zarr_view import encode_refs

__all__ = ["Proposal", "commit", "wait_committed", "was_committed"]

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25
_LOOK_EVERY = 3.0  # seconds of waiting between two looks for newer attempts
_AFTERMATH = 60.0  # seconds, at least, for who is still writing when a newer attempt starts
_STANDS = "The checkpoint before it stands."


@dataclass(frozen=True)
class Proposal:
    """A save that is on its way to be a checkpoint: what its manifest will say beside the checksums."""

    id: str
    step: int
    attempt: int
    metrics: dict[str, float | str]
    values: Any
    plan: SavePlan

    @property
    def world_size(self) -> int:
        """The number of ranks that write."""
        return len(self.plan.pack_sizes)

    def encode(self) -> bytes:
        """All but the plan, for a committer in another process."""
        return msgspec.json.encode(
            _Head(
                self.id,
                self.step,
                self.attempt,
                self.metrics,
                msgspec.Raw(msgspec.json.encode(self.values)),
            )
        )

    @classmethod
    def decode(cls, data: bytes, plan: SavePlan) -> Proposal:
        """What `encode` made, with its plan."""
        head = msgspec.json.decode(data, type=_Head)
        values = msgspec.json.decode(head.values)
        return cls(head.id, head.step, head.attempt, head.metrics, values, plan)

    def manifest(self, per_rank: Sequence[dict[str, Any]], checksums: Sequence[int]) -> Manifest:
        """The manifest, given every rank's own values and the CRC-32C of each row of the chunk table."""
        plan = self.plan
        return Manifest(
            id=self.id,
            step=self.step,
            attempt=self.attempt,
            world_size=self.world_size,
            created=time.time(),
            writer=f"shardckpt {__version__}",
            metrics=self.metrics,
            values=self.values,
            per_rank=list(per_rank),
            packs=tuple(Pack(pack_path(rank), size) for rank, size in enumerate(plan.pack_sizes)),
            tensors=plan.tensors,
            chunks=Chunks(pack=list(plan.writer), offset=list(plan.offset), crc32c=list(checksums)),
        )


class _Head(msgspec.Struct, frozen=True):
    id: str
    step: int
    attempt: int
    metrics: dict[str, float | str]
    values: msgspec.Raw


def commit(
    place: Place,
    proposal: Proposal,
    timeout: float,
    is_given_up: Callable[[], bool] = lambda: False,
    *,
    own_seconds: float = 0.0,
) -> Manifest:
    """Wait for every rank's part, then make the checkpoint exist.

    Raises SaveError if a rank reports that it failed, if no further part appears for `timeout` seconds, or if
    what the ranks wrote is not what was planned. Then there is no checkpoint.

    Raises SupersededError while parts are lacking if `is_given_up` says so, or if a newer attempt of the run has
    a checkpoint in this storage and no further part appears for `own_seconds`, the time that this process
    took to write its own; or, where the newer attempt has only started, for a minute if that is longer.
    """
    storage = place.storage
    parts = _wait_for_parts(storage, proposal, _Patience(place, timeout, is_given_up, own_seconds))
    manifest = _assemble(proposal, parts, place.url)
    _check_packs(storage, parts)
    storage.write(REFS, encode_refs(manifest, place.url))
    try:
        storage.create(MANIFEST, encode_record(manifest))  # from here on the checkpoint exists
    except FileExistsError as error:
        raise SaveError(
            f"{place.url} already has a checkpoint, made by another writer while this save was "
            "under way; it was left as it is"
        ) from error
    return manifest


def wait_committed(
    place: Place,
    save_id: str,
    timeout: float,
    is_given_up: Callable[[], bool] = lambda: False,
    *,
    own_seconds: float = math.inf,
) -> Manifest:
    """Wait until the committer has made this save's checkpoint, wherever the committer runs.

    Raises SaveError if it reports a failure, or no commit is to be seen for `timeout` seconds; SupersededError
    where `commit` would, or if the committer has raised that.
    """
    storage = place.storage
    patience = _Patience(place, timeout, is_given_up, own_seconds)
    pause, started = _FIRST_PAUSE, time.monotonic()
    while True:
        try:
            storage.read(MANIFEST, 0, 1)  # of what is not there yet, `read_manifest` also lists the folder
            manifest = read_manifest(place)
        except FileNotFoundError:
            _raise_failure(storage, "", save_id, place.url)
        else:
            break
        patience.check(
            time.monotonic() - started,
            "rank 0's process has not committed it",
            f"no commit was seen for {timeout:g} s, although this rank's part is durable; "
            "rank 0's process has probably ended",
        )
        pause = _rest(pause)
    if manifest.id != save_id:
        raise SaveError(f"{place.url} has a checkpoint of another writer; this save was not committed")
    return manifest


def was_committed(place: Place, save_id: str) -> bool:
    """Whether this very save is a checkpoint, as far as can be seen now."""
    try:
        return read_manifest(place).id == save_id
    except (OSError, ShardckptError):
        return False


class _Patience:
    """How long to wait for what others are to write: parts, or the commit."""

    def __init__(
        self, place: Place, timeout: float, is_given_up: Callable[[], bool], own_seconds: float
    ) -> None:
        self._place = place
        self.timeout = timeout
        self._grace = {
            Succession.NONE: math.inf,
            Succession.CLAIMED: max(_AFTERMATH, own_seconds),
            Succession.COMMITTED: own_seconds,
        }
        self._is_given_up = is_given_up
        self._succession = Succession.NONE
        # Where a newer attempt would not end the wait, nobody looks for one.
        self._looked = math.inf if math.isinf(own_seconds) else time.monotonic()

    def check(self, idle: float, lack: str, verdict: str) -> None:
        """Raise SaveError if it is at an end, after `idle` seconds in which nothing came.

        `lack`: what has not come; `verdict`: what it means if that takes too long.
        """
        self._look()
        if self._is_given_up() or idle >= self._grace[self._succession]:
            raise SupersededError(
                f"{self._place.url}: given up, since the run goes on in a newer attempt, and {lack}"
            )
        if idle >= self.timeout:
            raise SaveError(f"{self._place.url}: {verdict}")

    def _look(self) -> None:
        """See what there is of newer attempts, now and then."""
        now = time.monotonic()
        if self._succession is Succession.COMMITTED or now < self._looked + _LOOK_EVERY:
            return
        with contextlib.suppress(OSError):  # which says nothing about newer attempts
            self._succession = succession(self._place)
        self._looked = time.monotonic()


def _wait_for_parts(storage: Storage, proposal: Proposal, patience: _Patience) -> list[Part]:
    """The part of every rank, read from the storage."""
    parts: dict[int, Part] = {}
    pause, progressed = _FIRST_PAUSE, time.monotonic()
    while True:
        known = len(parts)
        for rank in range(proposal.world_size):
            if rank not in parts and (part := _read_part(storage, rank, proposal)) is not None:
                parts[rank] = part
        if len(parts) == proposal.world_size:
            return [parts[rank] for rank in range(proposal.world_size)]
        if len(parts) > known:
            pause, progressed = _FIRST_PAUSE, time.monotonic()
        missing = [str(rank) for rank in range(proposal.world_size) if rank not in parts]
        shown = f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"
        who = f"rank {shown} of {proposal.world_size}"
        patience.check(
            time.monotonic() - progressed,
            f"{who} has not finished writing",
            f"{who} did not finish writing: no further part appeared for {patience.timeout:g} s. The "
            "checkpoint was not committed; the one before it stands.",
        )
        pause = _rest(pause)


def _read_part(storage: Storage, rank: int, proposal: Proposal) -> Part | None:
    """The rank's part of this very save, or None if it is not there yet."""
    try:
        part = decode_part(storage.read(part_path(rank)), storage.url)
    except (FileNotFoundError, FormatError):  # not there, or what an earlier failed save left
        part = None
    if part is not None and part.id == proposal.id and part.rank == rank:
        return part
    _raise_failure(storage, f"rank-{rank:05d}/", proposal.id, f"rank {rank} of {storage.url}")
    return None


def _raise_failure(storage: Storage, folder: str, save_id: str, who: str) -> None:
    """Raise SaveError if a failure of this save was reported in that folder."""
    try:
        report = read_small(storage, f"{folder}{FAILED}")
    except (FileNotFoundError, FormatError):
        return
    if report.get("id") == save_id:
        error = str(report.get("error")).removesuffix(f". {_STANDS}")
        kind = SupersededError if error.startswith(f"{SupersededError.__name__}: ") else SaveError
        raise kind(f"{who}: {error}. {_STANDS}")


def _assemble(proposal: Proposal, parts: Sequence[Part], where: str) -> Manifest:
    """The manifest, checked so far that every planned chunk was written where it was planned."""
    plan = proposal.plan
    checksums: list[int | None] = [None] * len(plan.writer)
    for part in parts:
        if part.size != plan.pack_sizes[part.rank]:
            raise SaveError(
                f"{where}: rank {part.rank} wrote {part.size} bytes, planned were "
                f"{plan.pack_sizes[part.rank]}"
            )
        for row, offset, checksum in zip(part.chunk, part.offset, part.crc32c, strict=True):
            if row >= len(plan.writer) or (plan.writer[row], plan.offset[row]) != (part.rank, offset):
                raise SaveError(f"{where}: rank {part.rank} wrote chunk {row} elsewhere")
            checksums[row] = checksum
    for row, source in plan.same_as.items():
        checksums[row] = checksums[source]
    if None in checksums:
        raise SaveError(f"{where}: chunk {checksums.index(None)} was written by no rank")
    return proposal.manifest(
        [part.values for part in parts], [checksum for checksum in checksums if checksum is not None]
    )


def _check_packs(storage: Storage, parts: Sequence[Part]) -> None:
    """What the storage has of each pack is what its writer says."""
    for part in parts:
        found = storage.size(pack_path(part.rank))
        if found != part.size:
            raise SaveError(
                f"{storage.url}/{pack_path(part.rank)} has {found} bytes, but rank {part.rank} wrote "
                f"{part.size}"
            )


def _rest(seconds: float) -> float:
    """Wait so long. Returns how long to wait the next time."""
    time.sleep(seconds)
    return min(2 * seconds, _LONGEST_PAUSE)
