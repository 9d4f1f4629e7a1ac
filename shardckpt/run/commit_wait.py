"""Waiting for other processes: for every rank's part, or for the manifest."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from shardckpt.errors import SaveError, ShardckptError, SupersededError
from shardckpt.format.manifest import MANIFEST, Manifest, Part, WrittenPack
from shardckpt.run.failure_reports import raise_failure
from shardckpt.run.parts import PartCollector
from shardckpt.run.places import FAILED, Place, Succession, read_manifest, succession
from shardckpt.run.proposal import Proposal

__all__ = ["Patience", "wait_committed", "wait_for_parts", "was_committed"]

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25


@dataclass(frozen=True)
class Patience:
    """How long to wait for what other processes are to write: parts, or the commit. Times are in seconds.

    Attributes:
        timeout: time without a further part, or without the commit, after which the save has failed.
        is_given_up: asked while something is missing; True ends the wait.
        own_seconds: how long this process took to write its own parts. Other writers get that much time after a
            newer attempt of the run has a checkpoint. Infinite: newer attempts do not end the wait, and nobody
            looks for them.
        aftermath: time that other writers get at least after a newer attempt has only started.
        look_every: time between two looks for newer attempts, which list folders.
    """

    timeout: float
    is_given_up: Callable[[], bool] = lambda: False
    own_seconds: float = math.inf
    aftermath: float = 60.0
    look_every: float = 3.0


def wait_committed(place: Place, save_id: str, patience: Patience) -> Manifest:
    """Wait until the committer has made this save's checkpoint, wherever the committer runs.

    Raises SaveError if the committer reports a failure or does not commit in time; SupersededError if the save is
    given up for a newer attempt, here or by the committer.
    """
    storage = place.storage
    wait = _Wait(place, patience)
    pause, started = _FIRST_PAUSE, time.monotonic()
    while True:
        try:
            storage.read(MANIFEST, 0, 1)  # of what is not there yet, `read_manifest` also lists the folder
            manifest = read_manifest(place)
        except FileNotFoundError:
            raise_failure(storage, FAILED, save_id, place.url)
        else:
            break
        wait.check(
            time.monotonic() - started,
            "rank 0's process has not committed it",
            f"no commit was seen for {patience.timeout:g} s, although this rank's part is durable; "
            "rank 0's process has probably ended",
        )
        pause = _rest(pause)
    if manifest.id != save_id:
        raise SaveError(f"{place.url} has a checkpoint of another writer; this save was not committed")
    return manifest


def was_committed(place: Place, save_id: str) -> bool:
    """True if this very save is a checkpoint, as far as can be seen now."""
    try:
        return read_manifest(place).id == save_id
    except (OSError, ShardckptError):
        return False


def wait_for_parts(
    place: Place, proposal: Proposal, patience: Patience, own: Part | None = None
) -> list[WrittenPack]:
    """Wait for the parts of all ranks, in the storage. Returns what each rank wrote, by rank.

    Args:
        place: of the checkpoint.
        proposal: the save.
        patience: how long to wait.
        own: what this process wrote itself; None: nothing, or it is looked for with the others.

    Raises SaveError if a rank reports a failure, or no further part comes in time; SupersededError if the save is
    given up for a newer attempt.
    """
    size = proposal.info.world_size
    wait = _Wait(place, patience)
    parts = PartCollector(place.storage, proposal.info.id, size)
    if own is not None:
        parts.add(own)
    pause, progressed = _FIRST_PAUSE, time.monotonic()
    while not parts.is_complete:
        if parts.look():
            pause, progressed = _FIRST_PAUSE, time.monotonic()
            continue
        missing = parts.missing()
        shown = f"{', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''}"
        who = f"rank {shown} of {size}"
        wait.check(
            time.monotonic() - progressed,
            f"{who} has not finished writing",
            f"{who} did not finish writing: no further part appeared for {patience.timeout:g} s. The "
            "checkpoint was not committed; the one before it stands.",
        )
        pause = _rest(pause)
    return parts.packs


class _Wait:
    """One wait at a place."""

    def __init__(self, place: Place, patience: Patience) -> None:
        self._place = place
        self._patience = patience
        self._limits = {
            Succession.NONE: math.inf,
            Succession.CLAIMED: max(patience.aftermath, patience.own_seconds),
            Succession.COMMITTED: patience.own_seconds,
        }
        self._succession = Succession.NONE
        self._looked = math.inf if math.isinf(patience.own_seconds) else time.monotonic()

    def check(self, idle: float, lack: str, verdict: str) -> None:
        """Raise SaveError or SupersededError if the wait is at an end.

        Args:
            idle: seconds in which nothing has come.
            lack: what has not come.
            verdict: what it means if that takes too long.
        """
        self._look()
        if self._patience.is_given_up() or idle >= self._limits[self._succession]:
            raise SupersededError(
                f"{self._place.url}: given up, since the run goes on in a newer attempt, and {lack}"
            )
        if idle >= self._patience.timeout:
            raise SaveError(f"{self._place.url}: {verdict}")

    def _look(self) -> None:
        """Look for newer attempts, now and then."""
        now = time.monotonic()
        if self._succession is Succession.COMMITTED or now < self._looked + self._patience.look_every:
            return
        with contextlib.suppress(OSError):  # which says nothing about newer attempts
            self._succession = succession(self._place)
        self._looked = time.monotonic()


def _rest(seconds: float) -> float:
    """Wait so long. Returns how long to wait the next time."""
    time.sleep(seconds)
    return min(2 * seconds, _LONGEST_PAUSE)
