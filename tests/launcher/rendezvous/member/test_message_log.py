"""What follows from the entries of a log."""

from __future__ import annotations

from launcher.rendezvous.member.message_log import LogEntry, LogState, Record


def lost(node: int) -> dict[str, object]:
    return {"kind": "lost", "node": node, "why": "it is silent"}


def test_repeated_and_incoherent_messages_do_not_count() -> None:
    """A node sends again, in order, what it does not find in the log."""
    state = LogState(3)
    first, second, third = (Record(1, serial, {"kind": str(serial)}) for serial in (1, 2, 3))
    assert state.new_records([first, first, third]) == [first]
    assert state.add(LogEntry(0, [first, third])) == [first]
    assert state.new_records([first, second, third]) == [second, third]
    assert state.add(LogEntry(0, [first, second])) == [second]
    assert state.entries == 2


def test_a_loss_counts_once_and_silences_the_node() -> None:
    state = LogState(3)
    entry = LogEntry(0, [Record(0, 1, lost(2)), Record(1, 1, lost(2)), Record(2, 1, {"kind": "late"})])
    assert state.add(entry) == [entry.records[0]]
    assert state.new_records([Record(2, 1, {"kind": "late"})]) == []
    assert state.add(LogEntry(1, [Record(1, 2, {"kind": "next"})])) == [Record(1, 2, {"kind": "next"})]


def test_the_relay_is_who_has_appended_last_and_is_not_lost() -> None:
    state = LogState(3)
    assert state.relay == 0
    state.add(LogEntry(2, []))
    assert state.relay == 2
    state.add(LogEntry(2, [Record(2, 1, lost(2))]))
    assert state.relay == 0
    state.add(LogEntry(1, [Record(1, 1, lost(0))]))
    assert state.relay == 1
    assert LogState(3).copy().relay == 0
