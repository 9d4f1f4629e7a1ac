"""Which checkpoints are kept: rules over values, without a storage."""

from __future__ import annotations

from collections.abc import Sequence

from shardckpt.run.keep_rules import KeepNewest, StoredCheckpoint, kept
from shardckpt.run.places import step_path


def run(*steps: int, bad: tuple[int, ...] = ()) -> list[StoredCheckpoint]:
    """A run's checkpoints of these steps, of which some are bad; the newest first."""
    return [
        StoredCheckpoint(step_path("attempt-0001", step), 1, step, is_good=step not in bad)
        for step in sorted(steps, reverse=True)
    ]


def steps(paths: set[str]) -> list[int]:
    return sorted(int(path.rpartition("-")[2]) for path in paths)


def test_the_newest_are_kept() -> None:
    assert steps(kept([KeepNewest(2)], run(1, 2, 3))) == [2, 3]
    assert steps(kept([KeepNewest(5)], run(1, 2))) == [1, 2]


def test_bad_ones_do_not_count_but_stay_between_the_good_ones() -> None:
    assert steps(kept([KeepNewest(2)], run(1, 2, 3, 4, bad=(3,)))) == [2, 3, 4]
    assert steps(kept([KeepNewest(1)], run(1, 2, bad=(1, 2)))) == [1, 2]


def test_what_any_rule_keeps_is_kept() -> None:
    class KeepFirst:
        """Another rule."""

        def keep(self, checkpoints: Sequence[StoredCheckpoint], /) -> list[str]:
            return [checkpoints[-1].path]

    assert steps(kept([KeepNewest(1), KeepFirst()], run(1, 2, 3))) == [1, 3]


def test_without_a_rule_nothing_is_kept() -> None:
    assert kept([], run(1, 2)) == set()
