"""Restore: the newest good state of a run, from where it is nearest; the same on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from shardckpt.errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotACheckpointError,
    OutOfReachError,
    OutsideLinkError,
    StorageError,
    UnknownVersionError,
    finding,
)
from shardckpt.format import records
from shardckpt.loading.load import Loaded, load_place, load_source
from shardckpt.loading.snapshots import open_snapshot
from shardckpt.memory import no_garbage_collection
from shardckpt.progress import alive
from shardckpt.ranks.waiting import wait_together
from shardckpt.ranks.world import Ranks
from shardckpt.run.places import BAD, Place, checkpoint_order, iter_good
from shardckpt.run.tiers import MEMORY
from shardckpt.saver.client import SaverClient
from shardckpt.saver.protocol import Snapshot
from shardckpt.storage import Storage

__all__ = ["RestoreCandidates"]

_log = logging.getLogger("shardckpt")

_AGAIN = 2.0  # seconds between two tries of a storage that is out of reach


class _Candidate(msgspec.Struct, frozen=True):
    """Something that may be resumed from: a snapshot, or the checkpoint at `path` in a durable tier."""

    path: str
    tier: int = 0
    """The durable tier's number."""
    snapshot: Snapshot | None = None


class RestoreCandidates:
    """A run's states, newest first, and of equal ones the nearest first. Every rank makes one.

    Args:
        url: the run's.
        tiers: the durable tiers, nearest first: what each is called, and its root.
        client: this node's saver, if there is one.
        snapshots: those of the run in memory, the newest first.
        ranks: of the job that resumes.
        patience: seconds to wait for the last tier, where it is out of reach.
        is_reachable: whether the last tier is known to answer. If not, it is looked at last.
    """

    def __init__(
        self,
        url: str,
        tiers: Sequence[tuple[str, Storage]],
        client: SaverClient | None,
        snapshots: Sequence[Snapshot],
        ranks: Ranks,
        *,
        patience: float,
        is_reachable: bool,
    ) -> None:
        self._url = url
        self._snapshots = snapshots
        self._deadline = time.monotonic() + patience
        self._is_reachable = is_reachable
        self._is_told = False
        self._tiers = tiers
        self._client = client
        self._ranks = ranks

    @no_garbage_collection()
    def load(self, state: dict[str, Any], *, strict: bool, started: float) -> Loaded | None:
        """Load the newest good one into `state`; None if there is none at all. Collective.

        One that fails verification is reported, marked as bad and passed over. Raises what went wrong if there
        is no good one; UnknownVersionError for a newer one of another version, since nothing is wrong with it.
        """
        failure: CheckpointError | StorageError | None = None
        for candidate in self._candidates():
            try:
                loaded = self._load_patiently(candidate, state, strict=strict, started=started)
            except UnknownVersionError:
                raise  # going back silently would lose work
            except NotACheckpointError:
                continue  # pruned since it was listed
            except StorageError as error:
                if candidate.snapshot is not None or candidate.tier == len(self._tiers) - 1:
                    raise
                failure = error
                self._warn("going on without what the local tier has of it: %s", error)
                continue
            except (CorruptError, FormatError) as error:
                failure = error
                self._warn("going on with the checkpoint before it: %s", error)
                is_damaged = not isinstance(error, OutsideLinkError)
                if is_damaged and candidate.snapshot is None and self._ranks.rank == 0:
                    _mark_bad(self._place(candidate), error)
                continue
            if self._ranks.rank == 0:
                _log.info("resumed from %s (step %d, %s)", loaded.url, loaded.step, loaded.tier)
            return loaded
        if failure is not None:
            raise failure
        return None

    def _load_patiently(
        self, candidate: _Candidate, state: dict[str, Any], *, strict: bool, started: float
    ) -> Loaded:
        """Load a candidate, and wait if its storage is out of reach, which has nothing nearer."""
        while True:
            try:
                return self._load(candidate, state, strict=strict, started=started)
            except OutOfReachError as error:  # on all ranks
                is_last = candidate.snapshot is None and candidate.tier == len(self._tiers) - 1
                if not is_last or not any(self._ranks.maximum([time.monotonic() < self._deadline])):
                    raise
                self._tell_waiting(error)
            alive()
            time.sleep(_AGAIN)

    def _tell_waiting(self, error: OutOfReachError) -> None:
        if not self._is_told and self._ranks.rank == 0:
            self._is_told = True
            left = max(0.0, self._deadline - time.monotonic())
            _log.warning("restore waits for %s, for up to %.0f s: %s", self._url, left, error)

    def _load(
        self, candidate: _Candidate, state: dict[str, Any], *, strict: bool, started: float
    ) -> Loaded:
        if candidate.snapshot is None:
            place, tier = self._place(candidate), self._tiers[candidate.tier][0]
            return load_place(place, state, self._ranks, strict=strict, started=started, tier=tier)
        url = f"{self._url}/{candidate.path}"
        try:
            recalled = open_snapshot(self._client, candidate.snapshot, url, self._ranks)
            if recalled is None:
                raise NotACheckpointError(f"the snapshot of {url} is in no memory any more")
            manifest, packs = recalled
            return load_source(
                packs, manifest, state, self._ranks, strict=strict, started=started, tier=MEMORY
            )
        finally:
            if self._client is not None:
                self._client.detach()

    def _place(self, candidate: _Candidate) -> Place:
        return Place(self._tiers[candidate.tier][1], candidate.path)

    def _candidates(self) -> Iterator[_Candidate]:
        """What may be resumed from, in order; the same on every rank.

        Rank 0 looks, one at a time, and tells the others, however long that takes. Raises CorruptError if
        there are only checkpoints that are marked as bad.
        """
        candidates = self._merged(self._snapshots)
        what = f"looking for a checkpoint in {self._url}"
        while True:
            found = msgspec.convert(
                wait_together(self._ranks, lambda: next(candidates, None), what), _Candidate | None
            )
            if found is None:
                return
            yield found

    def _merged(self, snapshots: Sequence[Snapshot]) -> Iterator[_Candidate]:
        """As far as rank 0 can see: the newest of what each tier has next, the nearest tier first."""
        sources = [iter([_Candidate(snapshot.info.path, snapshot=snapshot) for snapshot in snapshots])]
        sources += [self._durable(number) for number in range(len(self._tiers))]
        heads: dict[int, _Candidate] = {}
        failure: CorruptError | StorageError | None = None
        found = False
        empty = set(range(len(sources)))
        later = set() if self._is_reachable else {len(sources) - 1}
        empty -= later
        while True:
            for number in sorted(empty):
                try:
                    head = next(sources[number], None)
                except CorruptError as error:  # this tier has bad ones only
                    failure = error
                    continue
                except StorageError as error:
                    if number == len(sources) - 1:
                        raise
                    _log.warning("resuming without the local tier: %s", error)
                    failure = error
                    continue
                if head is not None:
                    heads[number] = head
            if not heads and later:
                empty, later = later, set()
                continue
            if not heads:
                break
            number = max(heads, key=lambda n: (checkpoint_order(heads[n].path), -n))
            found = True
            yield heads.pop(number)
            empty = {number}
        if failure is not None and not found:
            raise failure

    def _durable(self, number: int) -> Iterator[_Candidate]:
        """A tier's checkpoints. Of the last tier, as long as there is time: it is waited for."""
        seen: set[str] = set()
        while True:
            try:
                for place in iter_good(self._tiers[number][1]):
                    if place.path not in seen:
                        seen.add(place.path)
                        yield _Candidate(place.path, number)
                return  # noqa: TRY300
            except OutOfReachError as error:
                if number < len(self._tiers) - 1 or time.monotonic() >= self._deadline:
                    raise
                self._tell_waiting(error)
            time.sleep(_AGAIN)

    def _warn(self, text: str, error: Exception) -> None:
        if self._ranks.rank == 0:
            _log.warning(text, finding(error))


def _mark_bad(place: Place, error: Exception) -> None:
    """Tell later readers that this checkpoint failed verification. Best effort."""
    record = records.encode_report(str(error), time=time.time())
    try:
        place.storage.write(BAD, record)
    except OSError as failure:
        _log.warning("%s could not be marked as bad: %s", place.url, failure)
