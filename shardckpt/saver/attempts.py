"""The attempts whose saves this saver holds, and where each of them is in its run."""

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
    """Keepers by run. Attempts are known here by the names that they began with, which never change.

    Args:
        is_job: whether a launcher looks after this process: it lives as long as the job does.
        terms: of leases.
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
        """An attempt has begun: claim it, if that is to be done here. Returns how it stands."""
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
        """Where a save is to lie in a tier, once that is known. Raises what `AttemptKeeper.wait` does.

        In another `tier` than the run's own, named "", saves need not wait for the claim: they lie there under
        the name that their attempt began with, if that sorts as the claim will.
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
        """The run's job has ended: tell so in the run. What is still to be persisted is claimed for all the same.

        Takes up to `timeout` seconds for each attempt.
        """
        for keeper in list(self._runs.get(run, {}).values()):
            if not keeper.is_over:
                keeper.end(timeout, stop=False)

    def runs(self) -> list[str]:
        """The runs of which attempts are kept."""
        return list(self._runs)

    def _grounded(self, run: str, keeper: AttemptKeeper) -> str:
        """The name that the attempt began with, if it follows one whose place is known."""
        base = keeper.attempt.base
        known = [attempt_number(other.condition.name) for other in self._runs[run].values()]
        return keeper.attempt.name if any(0 < number <= base for number in known) else ""
