"""What the agent waits for: sources, signals, one deadline and ticks, in one stream."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from launcher.agent.monitor import Monitor
from launcher.events import DeadlinePassed, Event, StopRequested, Tick, WorkersGone, ZygoteReady


class Told:
    """A source that tells each of its events once, as long as it has any."""

    def __init__(self, *events: Event) -> None:
        self._events = list(events)
        self._wake = os.eventfd(1)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self._wake,) if self._events else ()

    def receive(self) -> list[Event]:
        return [self._events.pop(0)]

    def close(self) -> None:
        os.close(self._wake)


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    with Monitor() as monitor:
        yield monitor


@pytest.fixture
def source() -> Iterator[Told]:
    source = Told(ZygoteReady(0.1), WorkersGone())
    yield source
    source.close()


def test_all_that_a_source_tells_is_handed_over_once(monitor: Monitor, source: Told) -> None:
    monitor.watch(source)
    monitor.push(Tick())
    assert next(monitor.events()) == Tick()
    assert next(monitor.events()) == ZygoteReady(0.1)  # also by another call
    monitor.set_deadline(0.0)
    events = monitor.events()
    assert {next(events), next(events)} == {WorkersGone(), DeadlinePassed()}


def test_a_deadline_passes_once(monitor: Monitor) -> None:
    monitor.set_deadline(0.0)
    monitor.set_ticks(0.0)
    events = monitor.events()
    assert [next(events) for _ in range(4)] == [DeadlinePassed(), Tick(), Tick(), Tick()]


@pytest.mark.parametrize("instead", [None, 3600.0])
def test_another_deadline_replaces_one_that_has_passed(monitor: Monitor, instead: float | None) -> None:
    """Also if nobody has heard of it yet: that of one phase must not cut the next one short."""
    monitor.set_deadline(0.0)
    monitor.set_ticks(0.0)
    events = monitor.events()
    monitor.push(Tick())
    assert next(events) == Tick()
    monitor.push(DeadlinePassed(), WorkersGone())
    monitor.set_deadline(instead)
    assert [next(events) for _ in range(3)] == [WorkersGone(), Tick(), Tick()]


def test_signals_are_told_in_their_order(monitor: Monitor) -> None:
    """SIGUSR2 is nobody's business, and harmless."""
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(os.getpid(), signum)
    events = monitor.events()
    assert [next(events), next(events)] == [StopRequested(signal.SIGTERM), StopRequested(signal.SIGINT)]
    monitor.set_deadline(0.0)
    assert next(events) == DeadlinePassed()


def test_what_was_ignored_stays_so_and_handlers_come_back() -> None:
    ignored, former = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with Monitor() as monitor:
            assert signal.getsignal(signal.SIGTERM) is not former
            os.kill(os.getpid(), signal.SIGHUP)
            monitor.set_deadline(0.0)
            assert next(monitor.events()) == DeadlinePassed()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is former
    finally:
        signal.signal(signal.SIGHUP, ignored)
