"""The workers of one round on this node: their files, their processes and how far they are."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from launcher.diagnosis.hang_timer import HangTimer
from launcher.events import SavedByWorkers
from launcher.formatting import name_ranks
from launcher.progress import Progress, read_progress
from launcher.run_dir import RankFiles
from launcher.system.process_state import has_handler

__all__ = ["Workers"]

WAITING = "waiting for saves"
"""The phase of a worker that only waits until what it has saved is durable."""


class Workers:
    """The workers that write to `files`, from the moment at which their start is ordered.

    Progress is as of the last `read_progress`.

    Args:
        files: The files of each worker.
        usual_start: Seconds from the start to the first step in the rounds before; None: unknown.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self,
        files: Iterable[RankFiles] = (),
        usual_start: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = {of_rank.rank: of_rank for of_rank in files}
        self.usual_start = usual_start
        self.pids: dict[int, int] = {}  # by rank, of started workers
        self.progress: dict[int, Progress] = {}  # by rank, of workers that have reported any
        self.saved: dict[str, int] = {}  # newest step, by tier, that they have committed without the saver
        self.waited_for_saves = 0.0  # seconds for which all have only waited for their saves
        self.stderr_sizes: dict[int, int] = {}
        """Bytes of stderr before SIGTERM, by rank, of the workers that handle it themselves."""
        self.hung_at: tuple[str, ...] = ()
        """Where the workers were when a hang was found, as `places` says."""
        self._monotonic = monotonic
        self._timer = HangTimer()
        self.began = self._last_read = monotonic()
        self._drain_began: float | None = None
        self._dead: set[int] = set()
        self._has_stepped = False

    # -- what happens to them

    def mark_started(self, rank: int, pid: int) -> None:
        """The zygote has forked this worker."""
        self.pids[rank] = pid

    def mark_dead(self, rank: int) -> None:
        """This worker has exited; it will report nothing any more."""
        self._dead.add(rank)

    def mark_draining(self) -> None:
        """The workers have been asked to save and leave: `still` counts from the first such request."""
        if self._drain_began is None:
            self._drain_began = self._monotonic()

    def mark_hung(self) -> None:
        """Keep where they are for the report of the hang."""
        self.hung_at = self.places()

    def prepare_stop(self) -> None:
        """Before SIGTERM: measure the stderr of those that handle it, to tell their answer from a failure."""
        for rank, pid in self.pids.items():
            if rank not in self._dead and has_handler(pid, signal.SIGTERM):
                self.stderr_sizes[rank] = _size(self.files[rank].err)

    def read_progress(self) -> list[SavedByWorkers]:
        """Read the progress files. Returns what the workers have committed by themselves since the last call."""
        for rank, files in self.files.items():
            progress = read_progress(files.progress)
            if progress is not None:
                self.progress[rank] = progress
        now = self._monotonic()
        seconds, self._last_read = now - self._last_read, now
        living = {rank: one for rank, one in self.progress.items() if rank not in self._dead}
        self._timer = self._timer.after(
            living,
            seconds,
            silent=self.files.keys() - self.progress.keys() - self._dead,
            are_known=self.usual_start is not None,
        )
        are_waiting = bool(self.progress) and all(
            (one.doing or "").startswith(WAITING) for one in living.values()
        )
        self.waited_for_saves = self.waited_for_saves + seconds if are_waiting else 0.0
        if self.step is not None and not self._has_stepped:
            self._has_stepped = True
            self.usual_start = max(self.usual_start or 0.0, self.age)
        before, self.saved = self.saved, _newest(self.progress.values())
        return [SavedByWorkers(step, tier) for tier, step in self.saved.items() if before.get(tier) != step]

    # -- how they are

    @property
    def have_all_started(self) -> bool:
        """True once the zygote has forked every one of them."""
        return len(self.pids) == len(self.files)

    @property
    def steps(self) -> dict[int, int | None]:
        """Last step by rank, of workers that have reported any progress; None: no step yet."""
        return {rank: progress.step for rank, progress in self.progress.items()}

    @property
    def step(self) -> int | None:
        """The highest step that any of them has reported."""
        return max((step for step in self.steps.values() if step is not None), default=None)

    @property
    def can_drain(self) -> bool:
        """True if any of them has said that it saves and leaves on request."""
        return any(progress.drains for progress in self.progress.values())

    @property
    def are_draining(self) -> bool:
        """True once they have been asked to save and leave."""
        return self._drain_began is not None

    @property
    def age(self) -> float:
        """Seconds since their start was ordered."""
        return self._monotonic() - self.began

    @property
    def still(self) -> float:
        """Seconds without progress of the slowest of them; while they drain, seconds since the request."""
        if self._drain_began is not None:
            return self._monotonic() - self._drain_began
        return self._timer.longest

    @property
    def is_watched(self) -> bool:
        """True if any of them reports progress, so that a hang can be seen."""
        return self._timer.is_known

    def hang(self, timeout: float) -> bool:
        """True if they hang, given that they should make progress every `timeout` seconds."""
        if self._drain_began is not None:
            return self.still >= timeout
        return self._timer.is_hang(timeout, self.usual_start or 0.0)

    def places(self) -> tuple[str, ...]:
        """What the living do that are not simply between two steps: one line for all ranks at one place."""
        alike: dict[str, list[int]] = {}
        for rank in sorted(self.files.keys() - self._dead):
            if (place := _place(self.progress.get(rank))) is not None:
                alike.setdefault(place, []).append(rank)
        return tuple(f"{name_ranks(ranks)} {place}" for place, ranks in alike.items())


def _newest(progress: Iterable[Progress]) -> dict[str, int]:
    """The newest step that any of the workers has committed, by tier."""
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
