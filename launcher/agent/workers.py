"""The workers of one round on this node, and what they tell of how far they are."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from pathlib import Path

from launcher.diagnosis.hang_timer import HangTimer
from launcher.events import SavedByWorkers
from launcher.formatting import name_ranks
from launcher.progress import Progress, read_progress
from launcher.run_dir import RankFiles
from launcher.system.process_state import has_handler

__all__ = ["Workers"]


WAITING = "waiting for saves"
"""The phase of a worker that waits for nothing but what it has saved to become durable."""


class Workers:
    """The workers that write to `files`, from the moment at which they are to be started.

    What it knows of their progress is as old as the last `look`. `usual_start` is how many seconds the first
    step took in rounds before; None: no worker has told of any.
    """

    def __init__(self, files: Iterable[RankFiles] = (), usual_start: float | None = None) -> None:
        self.files = {of_rank.rank: of_rank for of_rank in files}
        self.usual_start = usual_start
        self.pids: dict[int, int] = {}  # by rank, of those that have been started
        self.progress: dict[int, Progress] = {}  # by rank, of those that have told something
        self._stillness = HangTimer()
        self.began = self._looked = time.monotonic()
        self._asked_to_drain: float | None = None  # when
        self.said_before: dict[int, int] = {}  # bytes, by rank, of those that answer SIGTERM themselves
        self.waited = 0.0  # seconds, for nothing but what they have saved to become durable
        self.saved: dict[str, int] = {}  # newest step, by tier, that they have committed without the saver
        self._ended: set[int] = set()
        self._has_stepped = False

    def end(self, rank: int) -> None:
        """This one is dead, and will tell nothing any more."""
        self._ended.add(rank)

    def note_stop(self) -> None:
        """They are about to be told to end: note what those have written that will answer by themselves."""
        for rank, pid in self.pids.items():
            if rank not in self._ended and has_handler(pid, signal.SIGTERM):
                self.said_before[rank] = _size(self.files[rank].err)

    def look(self) -> list[SavedByWorkers]:
        """Read how far they are; returns the newest that they have saved by themselves since the last look."""
        for rank, files in self.files.items():
            progress = read_progress(files.progress)
            if progress is not None:
                self.progress[rank] = progress
        now = time.monotonic()
        self._stillness = self._stillness.after(
            {rank: one for rank, one in self.progress.items() if rank not in self._ended},
            now - self._looked,
            silent=self.files.keys() - self.progress.keys() - self._ended,
            are_known=self.usual_start is not None,
        )
        are_waiting = bool(self.progress) and all(
            (one.doing or "").startswith(WAITING)
            for rank, one in self.progress.items()
            if rank not in self._ended
        )
        self.waited = self.waited + now - self._looked if are_waiting else 0.0
        self._looked = now
        if self.step is not None and not self._has_stepped:
            self._has_stepped = True
            self.usual_start = max(self.usual_start or 0.0, self.age)
        before, self.saved = self.saved, _newest(self.progress.values())
        return [SavedByWorkers(step, tier) for tier, step in self.saved.items() if before.get(tier) != step]

    def ask_to_drain(self) -> None:
        """From now on they should come to an end, and are still until they do."""
        if self._asked_to_drain is None:
            self._asked_to_drain = time.monotonic()

    @property
    def have_all_started(self) -> bool:
        return len(self.pids) == len(self.files)

    @property
    def steps(self) -> dict[int, int | None]:
        """By rank, of those that have told something; None: no step yet."""
        return {rank: progress.step for rank, progress in self.progress.items()}

    @property
    def step(self) -> int | None:
        """The highest that one of them has reported."""
        return max((step for step in self.steps.values() if step is not None), default=None)

    @property
    def can_drain(self) -> bool:
        """Whether they answer when they are asked to save and end."""
        return any(progress.drains for progress in self.progress.values())

    @property
    def are_draining(self) -> bool:
        """Whether they have been asked to."""
        return self._asked_to_drain is not None

    @property
    def age(self) -> float:
        """Seconds since the first of them was to be started."""
        return time.monotonic() - self.began

    @property
    def still(self) -> float:
        """Seconds for which one of them has made no progress, or all have not done what they were asked to."""
        if self._asked_to_drain is not None:
            return time.monotonic() - self._asked_to_drain
        return self._stillness.longest

    @property
    def is_watched(self) -> bool:
        """Whether any of them tells of its progress."""
        return self._stillness.is_known

    def hang(self, timeout: float) -> bool:
        """Whether they hang, if they are to make progress every `timeout` seconds."""
        if self._asked_to_drain is not None:
            return self.still >= timeout
        return self._stillness.is_hang(timeout, self.usual_start or 0.0)

    def places(self) -> tuple[str, ...]:
        """What those do that live and have not made a step yet, or do something else: a line for those alike."""
        alike: dict[str, list[int]] = {}
        for rank in sorted(self.files.keys() - self._ended):
            if (place := _place(self.progress.get(rank))) is not None:
                alike.setdefault(place, []).append(rank)
        return tuple(f"{name_ranks(ranks)} {place}" for place, ranks in alike.items())


def _newest(progress: Iterable[Progress]) -> dict[str, int]:
    """By tier, the newest step that one of the workers has committed."""
    newest: dict[str, int] = {}
    for one in progress:
        for tier, step in one.saved.items():
            newest[tier] = max(step, newest.get(tier, step))
    return newest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _place(progress: Progress | None) -> str | None:
    if progress is None:
        return "starting: no Checkpointer yet"
    if progress.doing is not None:
        return f"in {progress.doing}"
    if progress.step is not None or progress.is_over:
        return None
    return "before the first step" if progress.restored is not None else "before restore"
