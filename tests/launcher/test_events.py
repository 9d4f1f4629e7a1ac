"""Events as --log-level debug tells them."""

from __future__ import annotations

import pytest

from launcher.events import DeadlinePassed, Event, MessageReceived, WorkerExited, ZygoteReady, describe


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (WorkerExited(0, 4711, 1, 2.5), "worker exited: rank 0, pid 4711, code 1, at 2.5"),
        (
            MessageReceived(0, {"kind": "ready", "port": 7}),
            "message received: from node 0, kind ready, port 7",
        ),
        (ZygoteReady(0.5), "zygote ready: seconds 0.5"),
        (DeadlinePassed(), "deadline passed"),
    ],
)
def test_events_in_words(event: Event, text: str) -> None:
    """Not as Python shows them; what is not known is left out."""
    assert describe(event) == text
