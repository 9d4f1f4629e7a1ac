"""The attempts whose saves this saver has, and where each of them lies in its run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shardckpt.run.attempt_keeper import AttemptKeeper, Condition
from shardckpt.run.attempts import Attempt
from shardckpt.run.lease import Terms
from shardckpt.run.places import attempt_number
from shardckpt.storage import Storage

__all__ = ["KeptAttempts"]


class KeptAttempts:
    """Keepers of attempts, by run. Attempts go by the names with which they began, which never change.

    Args:
        is_job: True if a launcher started this process, which then lives as long as the job does.
        terms: of the leases.
    """

    def __init__(self, *, is_job: bool, terms: Terms | None = None) -> None:
        self._is_job = is_job
        self._terms = terms
        self._runs: dict[str, dict[str, AttemptKeeper]] = {}
        self._bound: dict[tuple[str, str], str] = {}  # by attempt and tier
        self._binding = threading.Lock()

    def newest(self, run: str) -> int:
        """The number of the run's newest attempt that is known here; 0 if none is."""
        kept = self._runs.get(run, {})
        names = [*kept, *(keeper.condition.name for keeper in kept.values())]
        return max(map(attempt_number, names), default=0)

    def start(
        self,
        run: str,
        attempt: Attempt,
        *,
        claims: bool,
        name: str,
        opener: Callable[[], Storage],
        tell: Callable[[Condition], object],
        is_wanted: Callable[[], bool],
    ) -> Condition:
        """Keep an attempt that has begun. Returns how it stands.

        Args:
            run: the run's URL.
            attempt: as its job knows it.
            claims: True if it is to be claimed here.
            name: of its folder, if it is claimed already; else empty.
            opener: opens the run's storage.
            tell: called with each new condition, by another thread.
            is_wanted: True while trainers of the attempt live.
        """
        kept = self._runs.setdefault(run, {})
        keeper = kept.get(attempt.name)
        if keeper is None or keeper.is_over:
            before = next(reversed(kept.values()), None)
            holder = attempt.holder.with_process() if self._is_job and claims else attempt.holder
            keeper = kept[attempt.name] = AttemptKeeper(
                Attempt(attempt.id, attempt.name, attempt.base, holder),
                opener,
                after=before,
                tell=tell,
                is_wanted=is_wanted,
                terms=self._terms,
            )
        if name:
            keeper.learn(name)
        if claims:
            keeper.claim()
        for other in list(kept.values()):
            if other is not keeper:
                other.retire()
        return keeper.condition

    def path(self, run: str, path: str) -> str:
        """Where a save lies in its run, as far as that is known."""
        attempt, _, step = path.partition("/")
        keeper = self._runs.get(run, {}).get(attempt)
        name = keeper.condition.name if keeper is not None else ""
        return f"{name or attempt}/{step}"

    def wait_path(
        self, run: str, path: str, tier: str, patience: float, is_given_up: Callable[[], bool]
    ) -> str:
        """Wait until it is known where a save lies in a tier. Raises what `AttemptKeeper.wait` does.

        Args:
            run: the run's URL.
            path: the save's, by the name with which its attempt began.
            tier: the tier's name; empty for the run itself. In another tier saves need not wait for the claim:
                they lie there under the name with which their attempt began, if that sorts as the claim will.
            patience: seconds to wait.
            is_given_up: True ends the wait.
        """
        attempt, _, step = path.partition("/")
        keeper = self._runs.get(run, {}).get(attempt)
        if keeper is None:
            return path
        if not tier:
            return f"{keeper.wait(patience, is_given_up)}/{step}"
        with self._binding:
            bound = self._bound.get((attempt, tier), "")
            if not bound and (name := keeper.condition.name or self._grounded(run, keeper)):
                bound = self._bound[attempt, tier] = name
        return f"{bound or keeper.wait(patience, is_given_up)}/{step}"

    def end(self, run: str, timeout: float) -> None:
        """Note in the run that its job has ended. Attempts are still claimed for what is not durable yet.

        Takes up to `timeout` seconds for each attempt.
        """
        for keeper in list(self._runs.get(run, {}).values()):
            if not keeper.is_over:
                keeper.end(timeout, stop=False)

    def runs(self) -> list[str]:
        """The runs whose attempts are kept."""
        return list(self._runs)

    def _grounded(self, run: str, keeper: AttemptKeeper) -> str:
        """The name with which the attempt began, if it follows one whose place is known; else empty."""
        base = keeper.attempt.base
        known = [attempt_number(other.condition.name) for other in self._runs[run].values()]
        return keeper.attempt.name if any(0 < number <= base for number in known) else ""
