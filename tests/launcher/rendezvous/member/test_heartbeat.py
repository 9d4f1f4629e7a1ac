"""Silence, measured by heartbeats."""

from __future__ import annotations

from launcher.rendezvous.member.heartbeat import GONE, PERIOD, HeartbeatWatch, WaitingNodes


def test_a_heartbeat_that_does_not_change_is_silence() -> None:
    watch = HeartbeatWatch()
    looks = [watch.silent_nodes({1: "7", 2: str(i), 3: GONE}, i * PERIOD) for i in range(12)]
    first = next(i for i, silent in enumerate(looks) if silent)
    assert first * PERIOD == 4.0
    assert looks[first] == {1: 4.0}


def test_a_replayed_heartbeat_is_silence() -> None:
    """A process that has read heartbeats can write them again."""
    watch = HeartbeatWatch()
    looks = [watch.silent_nodes({1: "8" if i % 2 else "7", 2: None}, i * PERIOD) for i in range(20)]
    assert set(looks[-1]) == {1, 2}


def test_time_without_a_look_is_not_silence() -> None:
    watch = HeartbeatWatch()
    assert watch.silent_nodes({1: "7"}, 0.0) == {}
    assert watch.silent_nodes({1: "7"}, 100.0) == {}
    assert watch.silent_nodes({1: "8"}, 100.5) == {}
    assert watch.silent_nodes({1: "8"}, 101.0) == {}


def test_waiting_nodes_must_send_new_heartbeats() -> None:
    waiting = WaitingNodes(4.0)
    assert waiting.count_alive({"a": "1", "b": "7"}, 0.0) == 0
    assert waiting.count_alive({"a": "2", "b": "7"}, 1.0) == 1
    assert waiting.count_alive({"a": "3", "b": "8"}, 2.0) == 2
    assert waiting.count_alive({"a": "3", "b": "9"}, 6.5) == 1
    assert waiting.count_alive({"a": "3"}, 7.0) == 0
    assert waiting.count_alive({"a": "4"}, 8.0) == 1
