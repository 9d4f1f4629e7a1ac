"""Policies: pure rules that say at which steps to save."""

from __future__ import annotations

import pytest

from shardckpt.saving.policy import EverySteps, SaveContext, SaveSchedule

CONTEXT = SaveContext(outlives_trainer=True)


def steps_of(schedule: SaveSchedule, policy: str, until: int = 25) -> list[int]:
    """The steps at which one of the schedule's policies saves."""
    chosen = getattr(schedule, policy)
    return [step for step in range(until) if chosen.should_save(step, [], context=CONTEXT)]


def test_each_tier_has_its_own_cadence() -> None:
    schedule = SaveSchedule.every_steps(2, url=12, local=4)
    assert steps_of(schedule, "saves") == [*range(2, 25, 2)]
    assert steps_of(schedule, "local") == [4, 8, 12, 16, 20, 24]
    assert steps_of(schedule, "url") == [12, 24]


def test_a_tier_without_a_cadence_gets_all_saves() -> None:
    schedule = SaveSchedule.every_steps(10)
    assert schedule.saves == schedule.url == schedule.local == EverySteps(10)


def test_without_every_steps_nothing_is_saved() -> None:
    assert SaveSchedule.every_steps(None) == SaveSchedule(None, None, None)


@pytest.mark.parametrize(
    ("every", "url", "local", "message"),
    [
        (0, None, None, "every_steps must be a whole number of 1 or more, or None; it is 0"),
        (2.0, None, None, "every_steps must be a whole number"),
        (4, 6, None, "url_every_steps must be a multiple of every_steps, which is 4; it is 6"),
        (4, None, 2, "local_every_steps must be a multiple of every_steps"),
        (None, 2, None, "url_every_steps must be a multiple of every_steps, which is None"),
        (4, -4, None, "url_every_steps must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    every: int | None, url: int | None, local: int | None, message: str
) -> None:
    """The message names the Checkpointer's argument."""
    with pytest.raises(ValueError, match=message):
        SaveSchedule.every_steps(every, url=url, local=local)
