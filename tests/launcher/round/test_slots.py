"""Which devices get workers."""

from __future__ import annotations

from dataclasses import replace

from launcher.events import (
    WorkersGone,
)
from launcher.round.slots import Slots
from tests.kit.rounds import death, end_request, exited, play, report


def test_a_device_that_fails_twice_at_the_start_is_left_out() -> None:
    slots = Slots(present=8, wanted=8, minimum=6)
    for _ in range(2):
        round_ = play(exited(1, 1), WorkersGone(), report(deaths=(death(1),)))
        slots = round_.slots_after(slots, death(1))
    assert slots.left_out == (1,)
    assert slots.chosen == (0, 2, 3, 4, 5, 6, 7)


def test_only_what_fails_here_before_any_step_is_held_against_a_device() -> None:
    slots, once = Slots(2, 2, 1), Slots(2, 2, 1, suspect=1, strikes=1)
    here, far = play(nodes=2, rank=1), play(nodes=2)
    assert here.slots_after(slots, death(3)) == once
    assert far.slots_after(slots, death(3)) == slots
    assert here.slots_after(slots, replace(death(3), step=7)) == slots
    assert play(report(step=7)).slots_after(once, None) == slots
    assert play(report()).slots_after(once, None) == once


def test_devices_that_fail_by_turns_stay() -> None:
    slots = Slots(8, 8, 6)
    for slot in (1, 2, 1, 2):
        slots = slots.after_failed_start(slot)
    assert slots.left_out == ()


def test_nothing_is_left_out_where_all_are_needed() -> None:
    slots = Slots(8, 8, 8)
    for _ in range(5):
        slots = slots.after_failed_start(3)
    assert slots.chosen == tuple(range(8))


def test_progress_clears_a_device() -> None:
    slots = Slots(8, 8, 6).after_failed_start(3).after_progress().after_failed_start(3)
    assert slots.chosen == tuple(range(8))


def test_too_few_devices() -> None:
    slots = Slots(2, 2, 1)
    for slot in (0, 0, 1, 1):
        slots = slots.after_failed_start(slot)
    assert slots.chosen == ()
    assert slots.scaled(2).chosen == (0, 1)
    assert Slots(4, 4, 3, left_out=(0, 1)).chosen == ()


def test_a_spare_device_takes_the_place_of_a_dead_one() -> None:
    slots = Slots(present=8, wanted=4, minimum=3)
    slots = slots.after_failed_start(0).after_failed_start(0)
    assert slots.chosen == (1, 2, 3, 4)


def test_scaling() -> None:
    round_ = play(end_request("scale", slots=1), exited(0, 75), exited(1, 75))
    assert round_.slots_after(Slots(2, 2, 2), None).chosen == (0,)
    more = play(
        end_request("scale", slots=1),
        end_request("scale", slots=3),
        end_request("scale", node=1, slots=4),
        nodes=2,
    )
    assert more.slots_after(Slots(2, 2, 2), None) == Slots(3, 3, 2)
    assert Slots(8, 8, 6).scaled(4) == Slots(8, 4, 4)


def test_giving_up_a_device() -> None:
    """Those that are left take its place, if there are more than workers."""
    slots = Slots(8, 8, 8).scaled(7, (3,))
    assert slots.chosen == (0, 1, 2, 4, 5, 6, 7)
    assert slots.scaled(6, (0, 3)).chosen == (1, 2, 4, 5, 6, 7)
    assert slots.scaled(8).chosen == tuple(range(8))
    assert Slots(7, 7, 7).scaled(7, (3,)).chosen == (0, 1, 2, 4, 5, 6, 7)
