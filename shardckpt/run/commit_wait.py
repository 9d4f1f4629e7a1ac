"""Waiting for other processes: for every rank's part, or for the manifest."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

from shardckpt.errors import FormatError, SaveError, ShardckptError, SupersededError
from shardckpt.format.manifest import MANIFEST, Manifest, Part, part_path
from shardckpt.format.manifest_codec import decode_part
from shardckpt.run.failure_reports import raise_failure
from shardckpt.run.places import Place, Succession, read_manifest, succession
from shardckpt.run.proposal import Proposal
from shardckpt.storage import Storage

__all__ = ["Patience", "wait_committed", "wait_for_parts", "was_committed"]


_FIRST_PAUSE = 0.002


_LONGEST_PAUSE = 0.25


_LOOK_EVERY = 3.0  # seconds of waiting between two looks for newer attempts


_AFTERMATH = 60.0  # seconds, at least, for who is still writing when a newer attempt starts


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
    patience = Patience(place, timeout, is_given_up, own_seconds)
    pause, started = _FIRST_PAUSE, time.monotonic()
    while True:
        try:
            storage.read(MANIFEST, 0, 1)  # of what is not there yet, `read_manifest` also lists the folder
            manifest = read_manifest(place)
        except FileNotFoundError:
            raise_failure(storage, "", save_id, place.url)
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


class Patience:
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


def wait_for_parts(storage: Storage, proposal: Proposal, patience: Patience) -> list[Part]:
    """The part of every rank, read from the storage."""
    parts: dict[int, Part] = {}
    pause, progressed = _FIRST_PAUSE, time.monotonic()
    while True:
        known = len(parts)
        for rank in range(proposal.info.world_size):
            if rank not in parts and (part := _read_part(storage, rank, proposal)) is not None:
                parts[rank] = part
        if len(parts) == proposal.info.world_size:
            return [parts[rank] for rank in range(proposal.info.world_size)]
        if len(parts) > known:
            pause, progressed = _FIRST_PAUSE, time.monotonic()
        missing = [str(rank) for rank in range(proposal.info.world_size) if rank not in parts]
        shown = f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"
        who = f"rank {shown} of {proposal.info.world_size}"
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
    if part is not None and part.id == proposal.info.id and part.rank == rank:
        return part
    raise_failure(storage, f"rank-{rank:05d}/", proposal.info.id, f"rank {rank} of {storage.url}")
    return None


def _rest(seconds: float) -> float:
    """Wait so long. Returns how long to wait the next time."""
    time.sleep(seconds)
    return min(2 * seconds, _LONGEST_PAUSE)
