"""Restore: load the newest good state of a run from its nearest copy, the same one on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
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
from shardckpt.loading.leftovers import Leftovers
from shardckpt.loading.load import Loaded, load_source, shared_manifest
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

_RETRY_PAUSE = 2.0  # seconds between two tries of a storage that is out of reach


class _Candidate(msgspec.Struct, frozen=True):
    """A state that can be restored: a snapshot, or a checkpoint in a durable tier.

    Attributes:
        path: the checkpoint's, relative to the run.
        tier: the number of the durable tier; of no meaning for a snapshot.
        snapshot: None for a checkpoint.
    """

    path: str
    tier: int = 0
    snapshot: Snapshot | None = None


class RestoreCandidates:
    """The states of a run that can be restored: the newest first, and of equal ones the nearest first.

    Every rank makes one with the same arguments, but for `client`.

    Args:
        url: of the run.
        tiers: (name, root) of each durable tier, the nearest first.
        client: this node's saver; None without one.
        snapshots: of the run, in memory, the newest first.
        ranks: of the job that resumes.
        patience: seconds to wait for the last tier while it is out of reach.
        is_reachable: True if the last tier is known to answer. Otherwise it is searched after all others.
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
        self._has_warned = False
        self._tiers = tiers
        self._client = client
        self._ranks = ranks
        self._leftovers = Leftovers()

    @no_garbage_collection()
    def load(self, state: dict[str, Any], *, strict: bool, started: float) -> Loaded | None:
        """Load the newest good candidate into `state`; None if there is no candidate. Collective.

        Args:
            state: as `load` has it.
            strict: as `load` has it.
            started: when the restore began, by time.monotonic().

        A candidate is written into the state while it is verified. One that fails is logged, marked as bad and
        passed over: the next one overwrites what it has left. If none is good, the last error is raised, which
        says what of the state is partly loaded. UnknownVersionError of a newer candidate is raised at once: that
        one is not damaged, and to pass it over would lose its work.
        """
        with self._leftovers.explained():
            return self._load_newest(state, strict=strict, started=started)

    def _load_newest(self, state: dict[str, Any], *, strict: bool, started: float) -> Loaded | None:
        failure: CheckpointError | StorageError | None = None
        for candidate in self._candidates():
            try:
                loaded = self._load_patiently(candidate, state, strict=strict, started=started)
            except UnknownVersionError:
                raise
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
        """Load a candidate; while its storage, the last tier, is out of reach, try again until the deadline."""
        while True:
            try:
                return self._load(candidate, state, strict=strict, started=started)
            except OutOfReachError as error:  # on all ranks
                is_last = candidate.snapshot is None and candidate.tier == len(self._tiers) - 1
                if not is_last or not any(self._ranks.maximum([time.monotonic() < self._deadline])):
                    raise
                self._warn_waiting(error)
            alive()
            time.sleep(_RETRY_PAUSE)

    def _warn_waiting(self, error: OutOfReachError) -> None:
        if not self._has_warned and self._ranks.rank == 0:
            self._has_warned = True
            left = max(0.0, self._deadline - time.monotonic())
            _log.warning("restore waits for %s, for up to %.0f s: %s", self._url, left, error)

    def _load(
        self, candidate: _Candidate, state: dict[str, Any], *, strict: bool, started: float
    ) -> Loaded:
        load = partial(
            load_source,
            state=state,
            ranks=self._ranks,
            strict=strict,
            started=started,
            atomic=False,
            leftovers=self._leftovers,
        )
        if candidate.snapshot is None:
            place = self._place(candidate)
            return load(place, shared_manifest(place, self._ranks), tier=self._tiers[candidate.tier][0])
        url = f"{self._url}/{candidate.path}"
        try:
            opened = open_snapshot(self._client, candidate.snapshot, url, self._ranks)
            if opened is None:
                raise NotACheckpointError(f"the snapshot of {url} is in no memory any more")
            manifest, packs = opened
            return load(packs, manifest, tier=MEMORY)
        finally:
            if self._client is not None:
                self._client.detach()

    def _place(self, candidate: _Candidate) -> Place:
        return Place(self._tiers[candidate.tier][1], candidate.path)

    def _candidates(self) -> Iterator[_Candidate]:
        """The candidates in order, the same on every rank. Collective.

        Rank 0 searches for one at a time and sends it to the others. Raises CorruptError if all checkpoints are
        marked as bad.
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
        """The candidates that rank 0 finds: the newest of each tier.s next ones, of equal ones the nearest."""
        sources = [iter([_Candidate(snapshot.info.path, snapshot=snapshot) for snapshot in snapshots])]
        sources += [self._durable(number) for number in range(len(self._tiers))]
        heads: dict[int, _Candidate] = {}
        failure: CorruptError | StorageError | None = None
        found = False
        last = len(sources) - 1
        postponed = set() if self._is_reachable else {last}
        empty = set(range(len(sources))) - postponed
        while True:
            for number in sorted(empty):
                try:
                    head = next(sources[number], None)
                except CorruptError as error:  # all of this tier are marked as bad
                    failure = error
                    continue
                except StorageError as error:
                    if number == last:
                        raise
                    _log.warning("resuming without the local tier: %s", error)
                    failure = error
                    continue
                if head is not None:
                    heads[number] = head
            if not heads and postponed:
                empty, postponed = postponed, set()
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
        """The checkpoints of a durable tier, the newest first. The last tier is waited for until the deadline."""
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
                self._warn_waiting(error)
            time.sleep(_RETRY_PAUSE)

    def _warn(self, text: str, error: Exception) -> None:
        if self._ranks.rank == 0:
            _log.warning(text, finding(error))


def _mark_bad(place: Place, error: Exception) -> None:
    """Mark the checkpoint as bad for later readers: it failed verification. A failure to do so is logged."""
    record = records.encode_report(str(error), time=time.time())
    try:
        place.storage.write(BAD, record)
    except OSError as failure:
        _log.warning("%s could not be marked as bad: %s", place.url, failure)
