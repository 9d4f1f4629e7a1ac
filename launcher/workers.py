"""The workers of one round on this node, and what they tell of how far they are."""

from __future__ import annotations

import time
from collections.abc import Iterable

from launcher.progress import Progress, read_progress
from launcher.run_dir import RankFiles
from launcher.stillness import Stillness

__all__ = ["Workers"]


class Workers:
    """The workers that write to `files`, from the moment at which they are to be started.

    What it knows of their progress is as old as the last `look`.
    """

    def __init__(self, files: Iterable[RankFiles] = ()) -> None:
        self.files = {of_rank.rank: of_rank for of_rank in files}
        self.pids: dict[int, int] = {}  # by rank, of those that have been started
        self.progress: dict[int, Progress] = {}  # by rank, of those that have told something
        self._stillness = Stillness()
        self._began = self._looked = time.monotonic()
        self._asked_to_drain: float | None = None  # when

    def look(self) -> None:
        """Read how far they are."""
        for rank, files in self.files.items():
            progress = read_progress(files.progress)
            if progress is not None:
                self.progress[rank] = progress
        now = time.monotonic()
        self._stillness = self._stillness.after(self.steps, now - self._looked)
        self._looked = now

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
        return time.monotonic() - self._began

    @property
    def still(self) -> float:
        """Seconds for which one of them has made no progress, or all have not done what they were asked to."""
        if self._asked_to_drain is not None:
            return time.monotonic() - self._asked_to_drain
        return self._stillness.longest
